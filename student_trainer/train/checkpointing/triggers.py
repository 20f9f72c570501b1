"""Triggers of checkpoints and evaluations; all but the clock is a function of the step."""

from __future__ import annotations

import math
import time

from stillhouse.student_trainer.config.resources import CheckpointConfig
from stillhouse.student_trainer.config.schema import EvaluationConfig
from stillhouse.student_trainer.train.data.schedule import Schedule


class Triggers:
    """Intervals of one run."""

    def __init__(
        self, checkpoint: CheckpointConfig, evaluation: EvaluationConfig, schedule: Schedule
    ) -> None:
        self._checkpoint = checkpoint
        self._evaluation = evaluation
        self._schedule = schedule
        self._saved_at = time.monotonic()

    def should_save(self, step: int) -> bool:
        """True if a checkpoint is due after `step` steps."""
        wanted = self._checkpoint
        age_s = time.monotonic() - self._saved_at
        too_old = wanted.every_seconds is not None and age_s >= wanted.every_seconds
        return too_old or self._ends_interval(step, wanted.every_steps, wanted.every_epochs)

    def should_evaluate(self, step: int) -> bool:
        """True if an evaluation is due after `step` steps."""
        return self._ends_interval(step, self._evaluation.every_steps, self._evaluation.every_epochs)

    def mark_saved(self) -> None:
        """Restarts the clock of checkpoints."""
        self._saved_at = time.monotonic()

    def _ends_interval(self, step: int, every_steps: int | None, every_epochs: float | None) -> bool:
        """True if step number `step` is the last one of an interval."""
        if every_steps is not None and step % every_steps == 0:
            return True
        if every_epochs is None:
            return False
        after, before = self._schedule.epochs(step), self._schedule.epochs(step - 1)
        return math.floor(after / every_epochs + 1e-9) > math.floor(before / every_epochs + 1e-9)
