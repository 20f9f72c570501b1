"""The data of each step: every context requests its sequences ahead of the student, within a bounded window."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.data.context_mix import ContextMix, Slot
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.data.teacher_prompt import prompt_of
from stillhouse.student_trainer.train.process.waiting import TeacherWait
from stillhouse.student_trainer.train.teacher.query import TargetStream
from stillhouse.student_trainer.train.teacher.streams.generated import TextStream

log = structlog.get_logger()

A = TypeVar("A")

MAX_SKIPPED_SHARE = 0.01
"""A run fails once targets are non-finite for more sequences than this share, and than the next."""
MAX_SKIPPED_ANYWAY = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class StepData:
    """The training sequences of one optimizer step, all present before it begins, so that its denominator is known."""

    step: int
    """Counts from 0."""
    scored: Sequence[ScoredExample]
    """By context, in order; shorter than planned where a sequence was left out, which is counted."""
    teacher_wait_s: float
    """Seconds that the student waited for it."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the contexts in this step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedSettings:
    """Settings that the feeds of all contexts share."""

    context: int
    """Place of the context in the run file."""
    examples: Sequence[Example]
    """The training rows."""
    seed: int
    """Seed of data and texts."""
    ahead: int
    """Steps that are requested beyond the present one."""
    max_sequence_tokens: int
    """Longest sequence that may be generated, with its prompt."""
    sequence_limits: Mapping[str, int] = field(default_factory=dict)
    """Longest sequence of each teacher, with the prompt that it sees, by name."""
    patience: TeacherWait

    def room(self, example: Example) -> int:
        """Tokens that a completion of its prompt may have, so that every teacher takes it behind the prompt that it sees."""
        longest = self.max_sequence_tokens
        for name, limit in self.sequence_limits.items():
            prompt = prompt_of(example.teacher_prompts, name)
            if prompt is not None and example.teacher in ("", name):
                longest = min(longest, limit - prompt.shift)
        return longest - len(example.prompt)


class Feed(abc.ABC):
    """The data source of one context: requests the rows of a step, and hands them over in that order."""

    needs_student: ClassVar[bool] = False
    """Its requests depend on the student's weights."""

    def __init__(self, settings: FeedSettings, streams: Sequence[TargetStream | TextStream] = ()) -> None:
        """`streams` go to teachers."""
        self.ahead = settings.ahead
        """Steps that are requested beyond the present one."""
        self.metrics: Mapping[str, float] = {}
        """Metrics of the step that was collected last."""
        self._settings = settings
        self._streams = streams
        self._skips = Skips()

    @property
    def num_asked(self) -> int:
        """Sequences that this process requested from teachers."""
        return sum(stream.num_asked for stream in self._streams)

    def own(self, slots: Sequence[Slot], rank: int, size: int) -> list[Slot]:
        """The rows of a step that are those of process `rank` of `size`, by their place in the run."""
        return [slot for slot in slots if slot.position % size == rank]

    @abc.abstractmethod
    def request(self, step: int, slots: Sequence[Slot]) -> None:
        """Begins with the rows of a step; called once for each step, in order."""

    @abc.abstractmethod
    def collect(self, step: int) -> Iterator[ScoredExample]:
        """Training sequences of the step. Raises StillhouseError(NON_FINITE) once too many are skipped."""

    def _receive(self, get_result: Callable[[int, TeacherWait], A], sequence_id: int) -> A | None:
        """A stream's result; None if its targets are non-finite. Raises as `collect` does."""
        results = self._receive_all(get_result, [sequence_id])
        return results[0] if results else None

    def _receive_all(
        self, get_result: Callable[[int, TeacherWait], A], query_ids: Sequence[int]
    ) -> list[A] | None:
        """The results of all queries about one sequence; None if some targets are non-finite. Raises as `collect` does."""
        results: list[A] = []
        refused: StillhouseError | None = None
        for query_id in query_ids:
            try:
                results.append(get_result(query_id, self._settings.patience))
            except StillhouseError as error:
                if error.reason is not Reason.NON_FINITE:
                    raise
                refused = error
        if refused is not None:
            self._skips.count(refused, self.num_asked)
            return None
        return results


def generated_example(token_ids: NDArray[np.int32], num_prompt: int, place: str, teacher: str) -> Example:
    """A training sequence whose tokens behind the first `num_prompt` were generated."""
    mask = np.arange(len(token_ids)) >= num_prompt
    return Example(token_ids=token_ids, mask=mask, place=place, num_prompt=num_prompt, teacher=teacher)


class StepSource:
    """The contexts of a run, mixed."""

    def __init__(self, feeds: Sequence[Feed], mix: ContextMix, rank: int = 0, size: int = 1) -> None:
        """`rank` is that of this process among `size` that share every step."""
        self._feeds = feeds
        self._mix = mix
        self._rank, self._size = rank, size
        self._requested: list[int] = []
        """Steps that each feed has begun with, once there is one."""
        self._begun: list[Iterator[ScoredExample]] = []
        """Sequences of the first step that are still to come, by feed, once there is a sample."""
        self._samples: list[ScoredExample | None] = []
        self._waited_s = 0.0

    @property
    def num_asked(self) -> int:
        """Sequences that this process requested from teachers."""
        return sum(feed.num_asked for feed in self._feeds)

    def begin(self, after: int) -> None:
        """Requests the first rows of contexts that do not need the student, so that teachers work while it is made ready."""
        for number, feed in enumerate(self._feeds):
            if not feed.needs_student:
                self._request(number, after, after)

    def samples(self, after: int) -> list[ScoredExample]:
        """The first sequence of each context at step `after`, which `steps` then begins with. Raises as `steps` does."""
        self._request_all(after, after)
        began = time.monotonic()
        self._begun = [feed.collect(after) for feed in self._feeds]
        self._samples = [next(each, None) for each in self._begun]
        self._waited_s = time.monotonic() - began
        return [each for each in self._samples if each is not None]

    def steps(self, after: int) -> Iterator[StepData]:
        """The data of every step from `after` to the run's last.

        Raises:
            Stopped: the run was asked to stop.
            StillhouseError: a sequence cannot be had, or no teacher answers.
        """
        for step in range(after, self._mix.schedule.total_steps):
            self._request_all(step, after)
            began = time.monotonic()
            scored = list(chain.from_iterable(self._collected(step)))
            waited_s, self._waited_s = time.monotonic() - began + self._waited_s, 0.0
            metrics = {name: value for feed in self._feeds for name, value in feed.metrics.items()}
            yield StepData(step=step, scored=scored, teacher_wait_s=waited_s, metrics=metrics)

    def _request_all(self, step: int, after: int) -> None:
        for number in range(len(self._feeds)):
            self._request(number, step, after)

    def _request(self, number: int, step: int, after: int) -> None:
        """Requests rows of a feed for `step` and as many behind it as it works ahead; `after` is the run's first here."""
        feed, total = self._feeds[number], self._mix.schedule.total_steps
        self._requested = self._requested or [after] * len(self._feeds)
        while self._requested[number] < min(step + 1 + feed.ahead, total):
            slots = self._mix.slots(self._requested[number])[number]
            feed.request(self._requested[number], feed.own(slots, self._rank, self._size))
            self._requested[number] += 1

    def _collected(self, step: int) -> Iterator[Iterable[ScoredExample]]:
        """The sequences of a step by feed, samples that were taken first."""
        begun, self._begun = self._begun, []
        if not begun:
            yield from (feed.collect(step) for feed in self._feeds)
            return
        for sample, rest in zip(self._samples, begun, strict=True):
            yield chain([] if sample is None else [sample], rest)
        self._samples = []


class Skips:
    """Counts sequences that are left out because their targets are non-finite; many of them end the run."""

    def __init__(self) -> None:
        self.number = 0

    def count(self, error: StillhouseError, num_asked: int) -> None:
        """Counts a sequence. Raises `error` unless it is NON_FINITE, and NON_FINITE once too many are skipped."""
        if error.reason is not Reason.NON_FINITE:
            raise error
        self.number += 1
        log.warning("sequence left out", why=error.message, left_out=self.number)
        if self.number > max(MAX_SKIPPED_ANYWAY, MAX_SKIPPED_SHARE * num_asked):
            raise StillhouseError(
                Reason.NON_FINITE,
                f"The teacher's answers were non-finite for {self.number} of {num_asked} sequences; at most 1 % "
                f"are left out. Look at the teacher's weights and precision. The last one: {error.message}",
            ) from error
