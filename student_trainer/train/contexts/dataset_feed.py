"""The dataset's own completions, with targets of teachers or as text alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.batching.passes import deal
from stillhouse.student_trainer.train.contexts.source import Feed, FeedSettings
from stillhouse.student_trainer.train.data.context_mix import Slot
from stillhouse.student_trainer.train.teacher.query import TargetStream, TeacherQuery


class DatasetFeed(Feed):
    """The dataset's completions; with `targets`, rows whose targets are non-finite are skipped."""

    def __init__(self, settings: FeedSettings, targets: TargetStream | None) -> None:
        super().__init__(settings, [targets] if targets else [])
        self._targets = targets
        self._slots: dict[int, Sequence[Slot]] = {}

    def own(self, slots: Sequence[Slot], rank: int, size: int) -> list[Slot]:
        """The rows of a step that are those of process `rank`: all have about as many tokens."""
        lengths = [len(self._settings.examples[slot.row].token_ids) for slot in slots]
        return [slots[at] for at in deal(lengths, size)[rank]]

    def request(self, step: int, slots: Sequence[Slot]) -> None:
        self._slots[step] = slots
        if self._targets is not None:
            for slot in slots:
                query = TeacherQuery.from_example(self._settings.examples[slot.row])
                self._targets.submit(slot.position, query)

    def collect(self, step: int) -> Iterator[ScoredExample]:
        for slot in self._slots.pop(step):
            answer = self._receive(self._targets.get_result, slot.position) if self._targets else None
            if answer is not None or self._targets is None:
                example = self._settings.examples[slot.row]
                yield ScoredExample(example=example, answer=answer, context=self._settings.context)
