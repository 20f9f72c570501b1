"""A distillation that is disturbed from outside while it trains, and what it must be equal to afterwards."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from stillhouse.student_trainer.run_dir import RunDir
from tests.conftest import Models
from tests.student_trainer.train import runs
from tests.student_trainer.train.runs import metric, spec_of, waits
from tests.support.runs import wait_until

LONG = bool(os.environ.get("LONG"))
STEPS, BATCH, PREFETCH_STEPS, TOP_K = 40, 4, 2, 32
KEEPALIVE = {"STILLHOUSE_KEEPALIVE_S": "2"}
NOTICED_WITHIN_S = 60.0
"""4 s are enough: a ping every 2 s, 2 s for its answer; the rest is for a loaded machine."""


def spec(models: Models, data: Path, target: str, **further: Any) -> dict[str, Any]:
    """A run without held-out rows: all that it asks for is what it learns from."""
    made = spec_of(
        models.student,
        data,
        target,
        data={"eval_fraction": 0},
        optimizer={"max_steps": STEPS, "grad_accum_steps": 1},
        checkpoint={"every_steps": 5},
        retry={"teacher_wait_s": 120},
        **further,
    )
    made["teachers"][0]["prefetch_steps"] = PREFETCH_STEPS
    return made


def assert_same_end(run_dir: RunDir, undisturbed: RunDir) -> None:
    """Every step once, with the losses and the final weights of the run that nothing happened to."""
    assert sorted(metric(run_dir, "train/loss")) == list(range(1, STEPS + 1))
    runs.assert_same_end(run_dir, undisturbed)


def wait_for_steps(run_dir: RunDir, steps: int, process: subprocess.Popen[bytes]) -> None:
    """Until the run has taken so many steps."""
    wait_until(
        lambda: len(metric(run_dir, "train/loss")) >= steps or process.poll() is not None, f"{steps} steps"
    )
    assert process.poll() is None, run_dir.log_path(1).read_text()[-3000:]


def wait_waiting(run_dir: RunDir, process: subprocess.Popen[bytes]) -> None:
    """Until the run says that it waits for its teacher."""
    wait_until(
        lambda: bool(waits(run_dir)) or process.poll() is not None,
        "that the run says why it waits",
        patience_s=NOTICED_WITHIN_S,
    )
    assert waits(run_dir)[0] == "WAITING_FOR_TEACHER"
