"""Both services for the fuzz suite, with something in them to break; LONG=1 makes it more than 100,000 cases."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from tests.conftest import Models
from tests.fuzz.rpcs import Known
from tests.student_trainer.config.specs import cross_entropy_spec
from tests.student_trainer.runs.api.caller import stub_for, wait_step
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_teacher, start_trainer

SEED = os.environ.get("FUZZ_SEED", "1")
LONG = os.environ.get("LONG", "0") not in ("", "0")
CANARY = b"what no caller may ever read"
"""Stands in files outside of what clients may name."""
_tables: list[str] = []


def scaled(few: int, many: int) -> int:
    """The number of cases in the short and in the long form."""
    return many if LONG else few


def show(title: str, lines: Iterator[str]) -> None:
    """Has a table printed at the end of the tests."""
    _tables.append(f"{title} (FUZZ_SEED={SEED})\n" + "\n".join(lines))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for table in _tables:
        terminalreporter.write_line("\n" + table)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A service under attack."""

    program: Program
    known: Known


@pytest.fixture(scope="module")
def teacher(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A teacher that may load `inside`, and has a link beside it to what it may not."""
    root = tmp_path_factory.mktemp("fuzz-teacher")
    inside = root / "allowed" / "inside"
    shutil.copytree(models.adapter_a, inside)
    outside = root / "outside"
    shutil.copytree(models.adapter_b, outside)
    (root / "allowed" / "link").symlink_to(outside)
    (root / "allowed" / "loop").symlink_to("loop")
    options = [
        *("--dtype", "float32", "--threads", "1", "--max-sequence-tokens", "64", "--max-top-k", "32"),
        *("--allow-root", str(root / "allowed"), "--upload-dir", str(root / "uploads")),
        *("--max-upload-bytes", str(2**20), "--log-level", "warning"),
    ]
    files = {
        name: (inside / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    words = [str(inside), str(outside), str(root / "allowed" / "link"), str(root / "allowed" / "loop")]
    words += [f"{inside}/../../outside", str(root / "allowed"), f"{inside}\0", "a0", "a1", "a2"]
    with (
        no_process_left() as mark,
        start_teacher(
            models.teacher, engine="hf", directory=root / "log", options=options, environment=mark
        ) as program,
    ):
        yield Target(program=program, known=Known(words=words, files=files))


@pytest.fixture(scope="module")
def trainer(models: Models, dataset_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A run service whose one slot a run has that stands still after a few steps; links lead out of its directory."""
    root = tmp_path_factory.mktemp("fuzz-trainer")
    data_dir = root / "data"
    spec = cross_entropy_spec(models.student, dataset_file, steps=1_000_000)
    spec.checkpoint.every_steps = 2
    options = ["--stop-grace-s", "1000000", "--max-queued-runs", "60", "--log-level", "warning"]
    options += ["--max-upload-bytes", str(2**20), "--allow-root", str(models.student.parent)]
    options += ["--allow-root", str(dataset_file.parent)]
    with (
        no_process_left() as mark,
        start_trainer(data_dir, directory=root / "log", options=options, environment=mark) as program,
    ):
        with stub_for(program.target) as stub:
            name = stub.CreateRun(pb.CreateRunRequest(spec=spec)).name
            wait_step(stub, name, 3)
        run_dir = data_dir / name
        os.kill(json.loads((run_dir / "process.json").read_text())["pid"], signal.SIGSTOP)
        (data_dir / "canary").write_bytes(CANARY)
        (root / "canary").write_bytes(CANARY)
        (run_dir / "exports").mkdir(exist_ok=True)
        (run_dir / "exports" / "link").symlink_to(root / "canary")
        (run_dir / "exports" / "folder").symlink_to(root)
        (run_dir / "tensorboard" / "canary").symlink_to("../../../canary")
        words = [
            *("spec.json", "effective_spec.json", "checkpoints/2/MANIFEST.json", "exports/link"),
            *("exports/folder/canary", "tensorboard/canary", "../../canary", "checkpoints/../../../canary"),
            *(str(root / "canary"), str(models.student), str(dataset_file), "canary", "process.json", "lock"),
            *("datasets/" + "0" * 64, "caches/fuzz", "adapters/x", "runs/aaaaaaaaaaaa/final", "nobody/model"),
        ]
        known = Known(names=[name], words=words, spec=spec)
        yield Target(program=program, known=known)
