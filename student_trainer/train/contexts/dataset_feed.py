"""The dataset's own completions, with targets of teachers or as text alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from stillhouse.protos.errors import StillhouseError
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.contexts.source import FeedSettings, Skips
from stillhouse.student_trainer.train.data.context_mix import Slot
from stillhouse.student_trainer.train.teacher.query import TargetStream, TeacherQuery


class TextFeed:
    """A Feed of the dataset's completions without targets."""

    ahead = 0
    num_asked = 0

    def __init__(self, settings: FeedSettings) -> None:
        self._settings = settings
        self._slots: dict[int, Sequence[Slot]] = {}

    def request(self, step: int, slots: Sequence[Slot]) -> None:
        self._slots[step] = slots

    def collect(self, step: int) -> Iterator[ScoredExample]:
        for slot in self._slots.pop(step):
            example = self._settings.examples[slot.row]
            yield ScoredExample(example=example, answer=None, context=self._settings.context)

    def metrics(self) -> Mapping[str, float]:
        return {}


class DatasetFeed:
    """A Feed of the dataset's completions with targets; rows whose targets are non-finite are skipped."""

    def __init__(self, settings: FeedSettings, targets: TargetStream) -> None:
        self.ahead = settings.ahead
        self._settings = settings
        self._targets = targets
        self._skips = Skips()
        self._slots: dict[int, Sequence[Slot]] = {}

    @property
    def num_asked(self) -> int:
        return self._targets.num_asked

    def request(self, step: int, slots: Sequence[Slot]) -> None:
        self._slots[step] = slots
        for slot in slots:
            self._targets.submit(slot.position, TeacherQuery.from_example(self._settings.examples[slot.row]))

    def collect(self, step: int) -> Iterator[ScoredExample]:
        for slot in self._slots.pop(step):
            try:
                answer = self._targets.get_result(slot.position, self._settings.patience)
            except StillhouseError as error:
                self._skips.count(error, self.num_asked)
                continue
            example = self._settings.examples[slot.row]
            yield ScoredExample(example=example, answer=answer, context=self._settings.context)

    def metrics(self) -> Mapping[str, float]:
        return {}
