"""Runs under test: specs of tiny runs, the command line, and what a run left on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stillhouse.client.api import RunHandle
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.support.programs import Program

PATIENCE_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Service:
    """A run service under test and where it keeps its data."""

    program: Program
    data_dir: Path

    @property
    def target(self) -> str:
        return self.program.target

    def run_path(self, name: str) -> Path:
        """Directory of the run `name`."""
        return self.data_dir / name

    def stillhouse(self, *arguments: str, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
        """The client's command line against this service; its exit code must be `expect`, unless that is None."""
        return stillhouse("--trainer", self.target, *arguments, expect=expect)


def stillhouse(*arguments: str, expect: int | None = 0) -> subprocess.CompletedProcess[str]:
    """The client's command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "stillhouse.client", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )
    if expect is not None:
        assert done.returncode == expect, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def small_spec(
    *, student: Path, train: Path, teacher: str, steps: int = 6, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """A run file's content for a run of a few seconds; `changes` maps section to fields that are set in it."""
    spec: dict[str, Any] = {
        "student": {"model": str(student)},
        "teachers": [{"targets": [teacher]}],
        "data": {"train": [{"path": str(train)}], "eval_fraction": 0.25, "max_sequence_tokens": 128},
        "loss": {"top_k": 16},
        "optimizer": {"learning_rate": 2e-3, "max_steps": steps, "micro_batch_size": 4},
        "evaluation": {"top_k": 24},
        "retry": {"teacher_wait_s": 30},
    }
    for section, fields in (changes or {}).items():
        spec[section] = {**spec.get(section, {}), **fields}
    return spec


def write_run_file(path: Path, spec: Mapping[str, Any]) -> Path:
    """`spec` as YAML at `path`."""
    path.write_text(yaml.safe_dump(dict(spec), sort_keys=False))
    return path


def wait_until(condition: Callable[[], bool], what: str, *, patience_s: float = PATIENCE_S) -> None:
    """Returns once `condition` holds; fails with `what` after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {patience_s:g} s: {what}"
        time.sleep(0.002)


def completed(handle: RunHandle, service: Service) -> Run:
    """The ended run, which must be COMPLETED; otherwise its log is shown."""
    run = handle.wait()
    assert run.state == Run.STATE_COMPLETED, f"{run.error.message}\n{log_of(service, run)}"
    return run


def log_of(service: Service, run: Run) -> str:
    """The end of the log of the run's last attempt."""
    path = service.run_path(run.name) / "attempts" / str(len(run.attempts)) / "log"
    return path.read_text(errors="replace")[-8000:] if path.exists() else "(no log)"


def training_pid(service: Service, name: str, attempt: int) -> int | None:
    """The process of this attempt, or None before it has said who it is."""
    path = service.run_path(name) / "process.json"
    if not path.exists():
        return None
    process = json.loads(path.read_text())
    return int(process["pid"]) if process["attempt"] == attempt else None


def curve(handle: RunHandle, metric: str = "train/loss") -> dict[int, float]:
    """Step to value."""
    series = handle.metrics(metric)[metric]
    return dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
