"""A stream over several teachers: each query goes to the teacher that its row names, or to all, mixed by weight, with classes in
one order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from stillhouse.protos.tensors.classes import reorder_classes
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.train.batching.supports import mix
from stillhouse.student_trainer.train.process.waiting import TeacherWait
from stillhouse.student_trainer.train.teacher.query import TargetStream, TeacherQuery


def combine_streams(
    streams: Mapping[str, TargetStream], weights: Mapping[str, float] | None, *, vocab_size: int
) -> TargetStream:
    """One stream over `streams`, by the teachers' names: with `weights` their mixture, else routed by row."""
    if len(streams) == 1:
        return next(iter(streams.values()))
    return CombinedStream(streams, weights or {}, vocab_size=vocab_size)


class CombinedStream:
    """A TargetStream over those of several teachers."""

    def __init__(
        self, streams: Mapping[str, TargetStream], weights: Mapping[str, float], *, vocab_size: int
    ) -> None:
        self._streams = streams
        self._weights = weights
        self._vocab_size = vocab_size
        self._routes: dict[int, str] = {}

    @property
    def num_asked(self) -> int:
        """Sequences sent, counted for each teacher."""
        return sum(stream.num_asked for stream in self._streams.values())

    def submit(self, sequence_id: int, query: TeacherQuery) -> None:
        self._routes[sequence_id] = query.teacher
        for name in self._weights or (query.teacher,):
            self._streams[name].submit(sequence_id, query)

    def get_result(self, sequence_id: int, patience: TeacherWait) -> Distributions:
        route = self._routes.pop(sequence_id)
        if not self._weights:
            return self._streams[route].get_result(sequence_id, patience)
        parts = [self._streams[name].get_result(sequence_id, patience) for name in self._weights]
        return mix(parts, list(self._weights.values()), vocab_size=self._vocab_size)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()


def in_order(stream: TargetStream, names: Sequence[str], order: Sequence[str]) -> TargetStream:
    """The stream of a teacher whose classes are `names`, in the order of `order`, the same names; empty changes nothing."""
    if not order or list(names) == list(order):
        return stream
    return _OrderedClasses(stream, np.array([list(names).index(each) for each in order], np.int64))


class _OrderedClasses:
    """A TargetStream."""

    def __init__(self, stream: TargetStream, order: np.ndarray) -> None:
        self._stream = stream
        self._order = order

    @property
    def num_asked(self) -> int:
        return self._stream.num_asked

    def submit(self, sequence_id: int, query: TeacherQuery) -> None:
        self._stream.submit(sequence_id, query)

    def get_result(self, sequence_id: int, patience: TeacherWait) -> Distributions:
        return reorder_classes(self._stream.get_result(sequence_id, patience), self._order)

    def close(self) -> None:
        self._stream.close()
