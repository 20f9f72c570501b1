"""Run directories with metrics, as a training process leaves them, and tracker processes on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.student_trainer.config.proto import from_proto, to_proto
from stillhouse.student_trainer.run_dir import RunDir
from tests.student_trainer.config.specs import SMALLEST, spec_of

RUN_ID = "aaaaaaaaaaaa"
TEXTS = [
    {"set": "held_out", "text": "a|b\nc", "reference": "a"},
    {"set": "held_out", "text": "é", "reference": "e"},
]


def make_run(folder: Path, *trackers: Mapping[str, Any] | str) -> RunDir:
    """A run with these trackers."""
    listed = [{"kind": each} if isinstance(each, str) else dict(each) for each in trackers]
    values = {**SMALLEST, "display_name": "my run", "labels": {"team": "a"}, "trackers": listed}
    spec = spec_of(values)
    return RunDir.create(folder / "runs" / RUN_ID, spec, to_proto(from_proto(spec)))


def write_attempt(run_dir: RunDir, number: int, steps: Sequence[int], *, end: str = "") -> None:
    """Takes steps, evaluates after the last one, and ends with an event, or as if it had been killed."""
    run_dir.write_control(number, stop=False)
    with run_dir.open_attempt(number) as attempt:
        for step in steps:
            attempt.report_metrics(step, {"train/loss": 1 / step, "teacher/my teacher[0]": 2.0})
        attempt.report_metrics(steps[-1], {"eval/kl": 0.5 / steps[-1]})
        if end == "completed":
            folder = run_dir.path / "evaluations"
            folder.mkdir(exist_ok=True)
            (folder / "texts_after.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
            run_dir.final_path.mkdir()
        if end:
            attempt.report(end, step=steps[-1])


def track(
    run_dir: RunDir, kind: str, *, path: Path | None = None, timeout_s: float = 200, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Runs a tracker process by hand; `path` has its library."""
    paths = [str(path)] if path else []
    return subprocess.run(
        [
            sys.executable,
            "-P",
            "-m",
            "stillhouse.student_trainer.tracking",
            str(run_dir.path),
            "--kind",
            kind,
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*paths, str(Path.cwd())]), **variables},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
