"""Where a step's text and its teachers' answers come from: each context asks ahead of the student, within a bounded window."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.data.context_mix import Mix, Slot
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.process.waiting import Patience
from stillhouse.student_trainer.train.teacher.answers import Answers

log = structlog.get_logger()

MAX_SKIPPED_SHARE = 0.01
"""A run fails once the teacher's answers were no numbers for more sequences than this share, and than the next."""
MAX_SKIPPED_ANYWAY = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class StepData:
    """What one optimizer step learns from. All of it is there before the step begins, so its denominator is known."""

    step: int
    """Counts from 0."""
    scored: Sequence[ScoredExample]
    """By context, in order; shorter than planned where a sequence was left out, which is counted."""
    teacher_wait_s: float
    """How long the student waited for it."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """What the contexts say of this step."""


class Feed(Protocol):
    """One context: asks for the rows of a step, and hands them over in the order of asking."""

    ahead: int
    """Steps beyond the present one that it is asked for."""

    @property
    def num_asked(self) -> int:
        """Sequences that teachers were asked for in this process."""
        ...

    def ask(self, step: int, slots: Sequence[Slot]) -> None:
        """Begin with the rows of a step; called once for each step, in order."""
        ...

    def take(self, step: int) -> Iterator[ScoredExample]:
        """What the step learns from. Raises StillhouseError(NON_FINITE) through the skips that it counts."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Of the step that was taken last."""
        ...


class StepSource:
    """The contexts of a run, mixed."""

    def __init__(
        self, feeds: Sequence[Feed], mix: Mix, is_mine: Callable[[int], bool] = lambda _: True
    ) -> None:
        """`is_mine` says by its place in the run whether a row is this process's, where several share every step."""
        self._feeds = feeds
        self._mix = mix
        self._is_mine = is_mine

    @property
    def num_asked(self) -> int:
        """Sequences that teachers were asked for in this process."""
        return sum(feed.num_asked for feed in self._feeds)

    def steps(self, after: int) -> Iterator[StepData]:
        """The data of every step from `after` to the run's last.

        Raises:
            Stopped: the run shall stop.
            StillhouseError: why a sequence, or a teacher, cannot be had.
        """
        asked_until = [after] * len(self._feeds)
        total = self._mix.schedule.total_steps
        for step in range(after, total):
            for number, feed in enumerate(self._feeds):
                while asked_until[number] < min(step + 1 + feed.ahead, total):
                    slots = self._mix.slots(asked_until[number])[number]
                    feed.ask(asked_until[number], [slot for slot in slots if self._is_mine(slot.place)])
                    asked_until[number] += 1
            began = time.monotonic()
            scored = [each for feed in self._feeds for each in feed.take(step)]
            waited_s = time.monotonic() - began
            metrics = {name: value for feed in self._feeds for name, value in feed.metrics().items()}
            yield StepData(step=step, scored=scored, teacher_wait_s=waited_s, metrics=metrics)


class Skips:
    """Counts sequences that are left out because an answer was no numbers, and ends the run when they are many."""

    def __init__(self) -> None:
        self.number = 0

    def count(self, error: StillhouseError, num_asked: int) -> None:
        """Return if the run can go on without this sequence; raises `error` if it is another one than NON_FINITE."""
        if error.reason is not Reason.NON_FINITE:
            raise error
        self.number += 1
        log.warning("sequence left out", why=error.message, left_out=self.number)
        if self.number > max(MAX_SKIPPED_ANYWAY, MAX_SKIPPED_SHARE * num_asked):
            raise StillhouseError(
                Reason.NON_FINITE,
                f"The teacher's answers were no numbers for {self.number} of {num_asked} sequences; at most 1 % "
                f"are left out. Look at the teacher's weights and precision. The last one: {error.message}",
            ) from error


class DatasetFeed:
    """The dataset's own completions, with teachers' answers if there are any to be had."""

    def __init__(
        self,
        examples: Sequence[Example],
        answers: Answers | None,
        *,
        context: int,
        prefetch_steps: int,
        patience: Patience,
    ) -> None:
        self.ahead = prefetch_steps if answers else 0
        self._examples = examples
        self._answers = answers
        self._context = context
        self._patience = patience
        self._skips = Skips()
        self._slots: dict[int, Sequence[Slot]] = {}

    @property
    def num_asked(self) -> int:
        """Sequences that teachers were asked for."""
        return self._answers.num_asked if self._answers else 0

    def ask(self, step: int, slots: Sequence[Slot]) -> None:
        """Asks for the answers."""
        self._slots[step] = slots
        if self._answers is None:
            return
        for slot in slots:
            example = self._examples[slot.row]
            token_ids, start = example.asked
            self._answers.submit(slot.place, token_ids, start, example.place, teacher=example.teacher)

    def take(self, step: int) -> Iterator[ScoredExample]:
        """The rows with their answers."""
        for slot in self._slots.pop(step):
            answer = None
            if self._answers is not None:
                try:
                    answer = self._answers.take(slot.place, self._patience)
                except StillhouseError as error:
                    self._skips.count(error, self.num_asked)
                    continue
            yield ScoredExample(example=self._examples[slot.row], answer=answer, context=self._context)

    def metrics(self) -> Mapping[str, float]:
        """Nothing of its own."""
        return {}
