"""The gate before a student trains on its own rollouts."""

from __future__ import annotations

import math

import numpy as np
import structlog
from numpy.typing import NDArray

from stillhouse.student_trainer.config.checks import invalid_field

log = structlog.get_logger()


class WarmStart:
    """Requires that the teacher finds a student's first rollouts more likely than uniform guesses."""

    def __init__(
        self, min_logprob: float | None, *, vocab_size: int, alone: bool, field_path: str, is_open: bool
    ) -> None:
        """`alone`: the run has no other context to warm up on. `is_open`: a resumed run has passed it."""
        self._limit = -math.log(vocab_size) if min_logprob is None else min_logprob
        self._alone = alone
        self._field = field_path
        self._open = is_open
        self._sum = 0.0
        self._count = 0

    def see(self, target_logprobs: NDArray[np.float32]) -> None:
        """Adds the teacher's log-probabilities of the tokens of a rollout."""
        if not self._open:
            self._sum += float(np.maximum(target_logprobs, -1e6).sum())
            self._count += len(target_logprobs)

    def check(self, step: int) -> None:
        """Returns if the gate is passed. Raises StillhouseError(INVALID_SPEC) before anything is trained on from `step`."""
        if self._open or not self._count:
            return
        self._open = True
        mean = self._sum / self._count
        log.info("warm start", step=step + 1, teacher_logprob=round(mean, 3), limit=round(self._limit, 3))
        if mean >= self._limit:
            return
        description = (
            f"the teacher gives the student's first texts {mean:.2f} nats a token on average, less than the {self._limit:.2f} "
            "asked for: there is little to learn from texts that make no sense. Train on the dataset or on the teacher's "
            "texts first and name that run's final model as student.model, mix such a context in, or lower "
            f"{self._field}.min_teacher_logprob."
        )
        if not self._alone:
            log.warning("the student writes badly yet", why=description)
            return
        raise invalid_field(self._field, description)
