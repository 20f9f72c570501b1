"""The source of steps: teachers work before the student is ready, and a sample for the trial is a sequence of the first step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np

from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.contexts.source import Feed, FeedSettings, StepSource
from stillhouse.student_trainer.train.data.context_mix import ContextMix, Slot
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.data.schedule import Schedule

AHEAD = 2
EXAMPLES = [
    Example(token_ids=np.full(3, row, np.int32), mask=np.array([False, True, True]), place=f"row {row}")
    for row in range(40)
]


class RecordingFeed(Feed):
    """Hands over its rows, and records when they are requested and collected."""

    def __init__(self, context: int, journal: list[tuple[str, int, int]]) -> None:
        settings = FeedSettings(
            context=context,
            examples=EXAMPLES,
            seed=0,
            ahead=AHEAD,
            max_sequence_tokens=8,
            patience=cast("Any", None),  # nothing is waited for
        )
        super().__init__(settings)
        self._journal = journal
        self._slots: dict[int, Sequence[Slot]] = {}

    def request(self, step: int, slots: Sequence[Slot]) -> None:
        self._journal.append(("requested", self._settings.context, step))
        self._slots[step] = slots

    def collect(self, step: int) -> Iterator[ScoredExample]:
        for slot in self._slots.pop(step):
            self._journal.append(("collected", self._settings.context, slot.row))
            yield ScoredExample(example=EXAMPLES[slot.row], answer=None, context=self._settings.context)


class StudentLikeFeed(RecordingFeed):
    """A feed whose requests depend on the student."""

    needs_student = True


def source_of(*kinds: type[RecordingFeed]) -> tuple[StepSource, list[tuple[str, int, int]]]:
    journal: list[tuple[str, int, int]] = []
    schedule = Schedule(num_rows=len(EXAMPLES), rows_per_step=4, num_taken=20, seed=0)
    feeds = [kind(number, journal) for number, kind in enumerate(kinds)]
    return StepSource(feeds, ContextMix(weights=[1.0] * len(feeds), schedule=schedule, seed=0)), journal


def rows(source: StepSource, after: int) -> list[list[str]]:
    return [[each.example.place for each in data.scored] for data in source.steps(after)]


def test_samples_are_the_first_sequences_and_steps_stay_the_same() -> None:
    plain, _ = source_of(RecordingFeed, RecordingFeed)
    wanted = rows(plain, 1)
    source, journal = source_of(RecordingFeed, RecordingFeed)
    source.begin(1)
    samples = source.samples(1)
    assert [each.context for each in samples] == [0, 1]
    assert [each[0] for each in journal].count("collected") == 2  # the trial waits for no other sequence
    assert samples[0].example.place == wanted[0][0]
    found = rows(source, 1)
    assert found == wanted
    assert [len(each) for each in found] == [4] * 4
    requests = [each[1:] for each in journal if each[0] == "requested"]
    assert sorted(requests) == [(context, step) for context in (0, 1) for step in range(1, 5)]


def test_only_contexts_that_need_no_student_are_requested_before_it_is_ready() -> None:
    source, journal = source_of(StudentLikeFeed, RecordingFeed)
    source.begin(0)
    assert journal == [("requested", 1, step) for step in range(1 + AHEAD)]
    source.samples(0)
    assert [each[1:] for each in journal if each[:2] == ("requested", 0)] == [
        (0, step) for step in range(1 + AHEAD)
    ]


def test_the_wait_for_samples_counts_as_waiting_for_the_teacher() -> None:
    source, _ = source_of(RecordingFeed)
    source.samples(0)
    source._waited_s = 5.0
    waits = [data.teacher_wait_s for data in source.steps(0)]
    assert waits[0] >= 5
    assert max(waits[1:]) < 1
