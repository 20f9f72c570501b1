"""Reports metrics of a training process as journal lines and TensorBoard files, and says what holds its steps up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import structlog

from stillhouse.protos.telemetry import pace
from stillhouse.student_trainer.run_dir import Attempt


class Reporter:
    """Writes metrics of one attempt."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._writer: Any = None
        self._first_step = 0
        self._pace = PaceMonitor()

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
        self._pace.record(step, finite)
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
MIN_WAIT_S = 1.0
"""Time of a window below which nothing is said of what takes it."""


class PaceMonitor:
    """Says what a window's steps waited for where that is much, or where services had nothing to do."""

    def __init__(self) -> None:
        self._steps: list[Mapping[str, float]] = []

    def record(self, step: int, metrics: Mapping[str, float]) -> str:
        """Adds a step; returns what was said, empty if nothing was."""
        if pace.STEP not in metrics:
            return ""
        self._steps.append(metrics)
        if len(self._steps) < WINDOW_STEPS:
            return ""
        series = {name: [each[name] for each in self._steps if name in each] for name in pace.NAMES}
        self._steps.clear()
        found = pace.pace_of(series)
        if found is None or not found.advice or found.step_s * WINDOW_STEPS < MIN_WAIT_S:
            return ""
        log.warning(found.advice, step=step, pace=found.sentence())
        return found.advice
