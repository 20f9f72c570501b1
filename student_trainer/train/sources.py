"""Where a step's text and its teacher's answers come from: in the order of the schedule, asked for a bounded window ahead."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import structlog

from protos.errors import Reason, StillhouseError
from student_trainer.train.batch import Scored
from student_trainer.train.order import Schedule
from student_trainer.train.patience import Patience
from student_trainer.train.prompts import Example
from student_trainer.train.score_stream import ScoreStream

log = structlog.get_logger()

MAX_SKIPPED_SHARE = 0.01
"""A run fails once the teacher's answers were no numbers for more sequences than this share, and than the next."""
MAX_SKIPPED_ANYWAY = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class StepData:
    """What one optimizer step learns from. All of it is there before the step begins, so its denominator is known."""

    step: int
    """Counts from 0."""
    scored: Sequence[Scored]
    """In order; shorter than planned where the teacher's answer was no numbers."""
    teacher_wait_s: float
    """How long the student waited for it."""


class Source:
    """The dataset's own text, with a teacher's answers if there is a stream."""

    def __init__(
        self,
        examples: Sequence[Example],
        schedule: Schedule,
        *,
        stream: ScoreStream | None,
        prefetch_steps: int,
        patience: Patience,
    ) -> None:
        self._examples = examples
        self._schedule = schedule
        self._stream = stream
        self._prefetch_steps = prefetch_steps
        self._patience = patience
        self._num_skipped = 0

    @property
    def num_asked(self) -> int:
        """Sequences that the teacher was asked for in this process."""
        return self._stream.num_asked if self._stream else 0

    def steps(self, after: int) -> Iterator[StepData]:
        """The data of every step from `after` to the run's last.

        Raises:
            Stopped: the run shall stop.
            StillhouseError: why a sequence, or the teacher, cannot be had.
        """
        asked_until = after
        total = self._schedule.total_steps
        for step in range(after, total):
            if self._stream:
                while asked_until < min(step + 1 + self._prefetch_steps, total):
                    self._ask(asked_until)
                    asked_until += 1
            began = time.monotonic()
            scored = [each for each in self._gather(step) if each is not None]
            yield StepData(step=step, scored=scored, teacher_wait_s=time.monotonic() - began)

    def _ask(self, step: int) -> None:
        assert self._stream is not None
        first = step * self._schedule.rows_per_step
        for sequence_id, row in enumerate(self._schedule.rows(step), start=first):
            example = self._examples[row]
            self._stream.submit(sequence_id, example.token_ids, example.start, example.place)

    def _gather(self, step: int) -> Iterator[Scored | None]:
        first = step * self._schedule.rows_per_step
        for sequence_id, row in enumerate(self._schedule.rows(step), start=first):
            example = self._examples[row]
            if self._stream is None:
                yield Scored(example=example, answer=None)
                continue
            try:
                yield Scored(example=example, answer=self._stream.take(sequence_id, self._patience))
            except StillhouseError as error:
                if error.reason is not Reason.NON_FINITE:
                    raise
                self._skip(error)
                yield None

    def _skip(self, error: StillhouseError) -> None:
        self._num_skipped += 1
        log.warning("sequence left out", why=error.message, left_out=self._num_skipped)
        if self._num_skipped > max(MAX_SKIPPED_ANYWAY, MAX_SKIPPED_SHARE * self.num_asked):
            raise StillhouseError(
                Reason.NON_FINITE,
                f"The teacher's answers were no numbers for {self._num_skipped} of {self.num_asked} sequences; at most 1 % "
                f"are left out. Look at the teacher's weights and precision. The last one: {error.message}",
            ) from error
