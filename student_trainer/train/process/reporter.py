"""Reports metrics of a training process as journal lines and TensorBoard files, and warns of a slow teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import structlog

from stillhouse.student_trainer.run_dir import Attempt


class Reporter:
    """Writes metrics of one attempt."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._writer: Any = None
        self._first_step = 0
        self._waits = TeacherWaitMonitor()

    def close(self) -> None:
        """Closes the TensorBoard file."""
        if self._writer is not None:
            self._writer.close()

    def resume_at(self, step: int) -> None:
        """Cuts curves that an earlier attempt wrote beyond `step`."""
        self._first_step = step

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step; non-finite values are left out, because JSON cannot hold them."""
        if not self._attempt.writes:
            return
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        self._attempt.report_metrics(step, finite)
        self._waits.record(step, finite)
        for name, value in finite.items():
            self._tensorboard().add_scalar(name, value, step)

    def _tensorboard(self) -> Any:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            path = str(self._attempt.run_dir.tensorboard_path)
            self._writer = SummaryWriter(path, purge_step=self._first_step + 1 if self._first_step else None)
        return self._writer


log = structlog.get_logger()

WINDOW_STEPS = 20
MAX_WAIT_SHARE = 0.5
"""Share of a window's step time spent waiting above which a warning is logged."""
MIN_WAIT_S = 1.0
"""Waiting time below which no warning is logged."""


class TeacherWaitMonitor:
    """Warns when more than half of a window's step time is spent waiting for the teacher."""

    def __init__(self) -> None:
        self._waited_s = self._time_s = 0.0
        self._steps = 0

    def record(self, step: int, metrics: Mapping[str, float]) -> float | None:
        """Adds a step; returns the window's waiting share if it was warned of, else None."""
        if "train/step_time_s" not in metrics:
            return None
        self._waited_s += metrics.get("train/teacher_wait_s", 0.0)
        self._time_s += metrics["train/step_time_s"]
        self._steps += 1
        if self._steps < WINDOW_STEPS:
            return None
        share, waited_s = self._waited_s / max(self._time_s, 1e-9), self._waited_s
        self._waited_s = self._time_s = 0.0
        self._steps = 0
        if share <= MAX_WAIT_SHARE or waited_s < MIN_WAIT_S:
            return None
        log.warning(
            "the student waits for its teacher",
            step=step,
            share=round(share, 2),
            waited_s=round(waited_s, 1),
            remedy="name more services in teachers.targets, cache teacher outputs, or raise teachers.prefetch_steps",
        )
        return share
