"""When a checkpoint or an evaluation is due; all but the clock is a function of the step."""

from __future__ import annotations

import math
import time

from stillhouse.student_trainer.config.schema import CheckpointConfig, EvaluationConfig
from stillhouse.student_trainer.train.data.schedule import Schedule


class Triggers:
    """The rhythm of one run."""

    def __init__(
        self, checkpoint: CheckpointConfig, evaluation: EvaluationConfig, schedule: Schedule
    ) -> None:
        self._checkpoint = checkpoint
        self._evaluation = evaluation
        self._schedule = schedule
        self._saved_at = time.monotonic()

    def checkpoint(self, step: int) -> bool:
        """Whether one is due after `step` steps."""
        wanted = self._checkpoint
        waited_s = time.monotonic() - self._saved_at
        too_old = wanted.every_seconds is not None and waited_s >= wanted.every_seconds
        return too_old or self._completes(step, wanted.every_steps, wanted.every_epochs)

    def evaluation(self, step: int) -> bool:
        """Whether one is due after `step` steps."""
        return self._completes(step, self._evaluation.every_steps, self._evaluation.every_epochs)

    def saved(self) -> None:
        """A checkpoint was written just now."""
        self._saved_at = time.monotonic()

    def _completes(self, step: int, every_steps: int | None, every_epochs: float | None) -> bool:
        """Whether step number `step` is the last one of an interval."""
        if every_steps is not None and step % every_steps == 0:
            return True
        if every_epochs is None:
            return False
        after, before = self._schedule.epochs(step), self._schedule.epochs(step - 1)
        return math.floor(after / every_epochs + 1e-9) > math.floor(before / every_epochs + 1e-9)
