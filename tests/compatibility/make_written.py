"""Makes the archives that test_written_before.py opens: a data directory, models and a token, written by one version's programs.

One archive is made of every release that changes what is stored. The programs run as processes, with kernels pinned that
every x86-64 processor has, so that arithmetic is the same on all of them. Run it from the root of the version's checkout,
with the names that its modules have there; for 0.1.0, at commit a6087e9:

    PYTHONPATH=. python PLACE_OF_THIS_FILE/make_written.py /srv/stillhouse written_by_0_1_0.tar.xz --client client \
        --trainer student_trainer.runs --teacher teacher_service --small-models examples.small_models
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

PINNED = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
"""Environment of everything that computes; the test takes it over."""
SLEEPS_AT_CHECKPOINT = {"STILLHOUSE_FAILPOINT": "checkpoint.after_rename:1:stop"}
"""Has a training process stopped in its sleep once its first checkpoint is there, so that no step outruns `run stop`."""
STEPS, CHECKPOINT_STEPS = 12, 5
PATIENCE_S = 180.0
PACKED = ("data", "models/student", "token", "told.json", "resumed.safetensors")
"""All that goes into the archive."""


class Maker:
    """One version's programs at work below `root`; `modules` says what they are called."""

    def __init__(self, root: Path, modules: argparse.Namespace) -> None:
        self.root = root
        self.data_dir = root / "data"
        self.token = root / "token"
        self._modules = modules
        self._trainer = ""

    def make(self) -> None:
        """Writes everything in PACKED."""
        self.data_dir.mkdir(parents=True)
        self._make_models()
        tokens = ("--file", str(self.data_dir / "tokens.json"), "--to", str(self.token), "--expires", "never")
        self._ask("token", "create", "--name", "ada", "--scope", "submit", *tokens)
        rows = self.root / "rows.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in texts()))
        teacher = ("--model", str(self.root / "models/teacher"), "--engine", "hf", "--dtype", "float32")
        with self._service(self._modules.teacher, *teacher) as target, self._run_service():
            spec = self._spec(target, self._ask("data", "push", str(rows))["datasets"][0]["name"])
            lossless = {"path": "caches/lossless", "mode": "write_through"}
            compact = {"path": "caches/compact", "mode": "write_through", "codec": "compact"}
            built = self._create({**spec, "cache": lossless}, "cache", "build")
            self._wait(built, "COMPLETED")
            finished = self._create({**spec, "cache": compact}, "run", "create")
            self._wait(finished, "COMPLETED")
        with self._run_service(SLEEPS_AT_CHECKPOINT):  # from here on there is no teacher
            half_done = self._create({**spec, "cache": {**lossless, "mode": "only"}}, "run", "create")
            run_dir = self.data_dir / "runs" / half_done
            wait_until((run_dir / f"checkpoints/{CHECKPOINT_STEPS}").is_dir, "a checkpoint")
            self._ask("run", "stop", half_done)
            os.kill(json.loads((run_dir / "process.json").read_text())["pid"], signal.SIGCONT)
            self._wait(half_done, "STOPPED")
            told = {
                "root": str(self.root),
                "environment": PINNED,
                "arithmetic": arithmetic(),
                "built": self._told(built),
                "finished": self._told(finished),
                "half_done": self._told(half_done),
                "caches": {
                    name: self._ask("cache", "info", str(self.data_dir / "caches" / name))
                    for name in ("lossless", "compact")
                },
            }
        shutil.copytree(self.data_dir, self.root / "kept")
        with self._run_service():
            self._ask("run", "resume", half_done)
            self._wait(half_done, "COMPLETED")
            told["resumed"] = self._told(half_done)
        shutil.copy(run_dir / "final/model.safetensors", self.root / "resumed.safetensors")
        shutil.rmtree(self.data_dir)
        (self.root / "kept").rename(self.data_dir)
        (self.root / "told.json").write_text(json.dumps(told, indent=1))

    def _make_models(self) -> None:
        small_models = importlib.import_module(self._modules.small_models)
        models = self.root / "models"
        every_text = ["".join(row.values()) for row in texts()]
        tokenizer = small_models.make_tokenizer(every_text, models / "tokenizer", 160, full_alphabet=False)
        for seed, (name, spread) in enumerate({"teacher": 0.3, "student": 0.1}.items()):
            small_models.make_model(
                models / name,
                tokenizer_dir=tokenizer,
                hidden_size=32,
                num_layers=1,
                num_heads=1,
                intermediate_size=32,
                max_sequence_tokens=64,
                seed=seed,
                initializer_range=spread,
            )

    def _spec(self, target: str, dataset: str) -> dict[str, Any]:
        return {
            "student": {"model": str(self.root / "models/student")},
            "teachers": [{"targets": [target]}],
            "data": {"train": [{"path": dataset}], "eval_fraction": 0.2, "max_sequence_tokens": 64},
            "loss": {"top_k": 8},
            "optimizer": {
                "learning_rate": 1e-3,
                "max_steps": STEPS,
                "micro_batch_size": 4,
                "precision": "fp32",
            },
            "checkpoint": {"every_steps": CHECKPOINT_STEPS, "keep": 1},
            "evaluation": {"every_steps": 4, "top_k": 8},
        }

    @contextlib.contextmanager
    def _service(
        self, module: str, *options: str, environment: Mapping[str, str] | None = None
    ) -> Iterator[str]:
        """Yields the address of a service that runs within the block."""
        address = self.root / f"{module}.address"
        address.unlink(missing_ok=True)
        place = ("--listen", "127.0.0.1:0", "--address-file", str(address))
        with (self.root / f"{module}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", module, *options, *place],
                env={**os.environ, **PINNED, **(environment or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(lambda: address.exists() or process.poll() is not None, f"{module} listens")
            yield address.read_text().strip()
        finally:
            process.terminate()
            process.wait(PATIENCE_S)

    @contextlib.contextmanager
    def _run_service(self, environment: Mapping[str, str] | None = None) -> Iterator[None]:
        # So many places on the CPU that each run has one thread, however many cores there are.
        options = ("--data-dir", str(self.data_dir), "--cpu-slots", "4096")
        roots = ("--allow-root", str(self.root / "models"))
        with self._service(self._modules.trainer, *options, *roots, environment=environment) as self._trainer:
            yield

    def _ask(self, *arguments: str) -> Any:
        """The client's answer as JSON."""
        services = {"STILLHOUSE_TRAINER": self._trainer, "STILLHOUSE_TOKEN_FILE": str(self.token)}
        done = subprocess.run(
            [sys.executable, "-m", self._modules.client, *arguments, "--json"],
            env={**os.environ, **services},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def _create(self, spec: Mapping[str, Any], *command: str) -> str:
        """The new run's id."""
        file = self.root / "run.json"
        file.write_text(json.dumps(spec))
        return str(self._ask(*command, str(file))["id"])

    def _wait(self, run: str, state: str) -> None:
        wait_until(lambda: self._ask("run", "show", run)["state"] == state, f"run {run} is {state}")

    def _told(self, run: str) -> dict[str, Any]:
        """The client's whole account of a run."""
        return {
            "shown": self._ask("run", "show", run),
            "metrics": self._ask("run", "metrics", run)["series"],
        }


def texts() -> Iterator[dict[str, str]]:
    """Rows of the dataset, always the same."""
    draw = random.Random(1)
    for _ in range(40):
        name, first, second = draw.choice(("Ada", "Ben", "Cleo")), draw.randint(2, 40), draw.randint(2, 40)
        yield {
            "prompt": f"{name} has {first} and {second}: ",
            "completion": f"that is {first + second} in all.",
        }


def arithmetic() -> str:
    """All on which the bits of a pinned computation depend: torch's release and the processor's maker."""
    import torch

    info = Path("/proc/cpuinfo").read_text()
    makers = {line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("vendor_id")}
    return f"torch {torch.__version__.partition('+')[0]}, {', '.join(sorted(makers)) or 'no x86-64'}"


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Returns once `condition` holds; fails after PATIENCE_S."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s: {what}"
        time.sleep(0.1)


def pack(root: Path, archive: Path) -> None:
    """Packs PACKED, in a fixed order and without names of this machine."""

    def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        return member

    with tarfile.open(archive, "w:xz", preset=9) as file:
        for name in PACKED:
            file.add(root / name, name, filter=anonymous)


def main() -> None:
    """Makes one archive."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("root", type=Path, help="Fresh folder to work in; runs remember its name.")
    parser.add_argument("archive", type=Path)
    parser.add_argument("--client", default="stillhouse.client")
    parser.add_argument("--trainer", default="stillhouse.student_trainer.runs")
    parser.add_argument("--teacher", default="stillhouse.teacher_service")
    parser.add_argument("--small-models", default="tests.support.small_models")
    arguments = parser.parse_args()
    Maker(arguments.root, arguments).make()
    pack(arguments.root, arguments.archive)


if __name__ == "__main__":
    main()
