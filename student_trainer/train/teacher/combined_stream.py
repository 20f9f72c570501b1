"""Streams over several teachers: each query goes to the teacher that its row names, or to all, mixed by weight."""

from __future__ import annotations

from collections.abc import Mapping

from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.train.batching.supports import mix
from stillhouse.student_trainer.train.process.waiting import Patience
from stillhouse.student_trainer.train.teacher.query import TargetStream, TeacherQuery


def combine_streams(
    streams: Mapping[str, TargetStream], weights: Mapping[str, float] | None, *, vocab_size: int
) -> TargetStream:
    """One stream over `streams`, by the teachers' names: with `weights` their mixture, else routed by row."""
    if len(streams) == 1:
        return next(iter(streams.values()))
    if weights is None:
        return RoutedStream(streams)
    return MixedStream(streams, weights, vocab_size=vocab_size)


class RoutedStream:
    """Sends each query to the teacher that its row names."""

    def __init__(self, streams: Mapping[str, TargetStream]) -> None:
        self._streams = streams
        self._routes: dict[int, TargetStream] = {}

    @property
    def num_asked(self) -> int:
        """Sequences sent to teachers."""
        return sum(stream.num_asked for stream in self._streams.values())

    def submit(self, sequence_id: int, query: TeacherQuery) -> None:
        """Sends a query to its teacher."""
        self._routes[sequence_id] = self._streams[query.teacher]
        self._routes[sequence_id].submit(sequence_id, query)

    def take(self, sequence_id: int, patience: Patience) -> Distributions:
        """Waits for the result. Raises what the teacher's stream raises."""
        return self._routes.pop(sequence_id).take(sequence_id, patience)

    def close(self) -> None:
        """Ends the streams."""
        for stream in self._streams.values():
            stream.close()


class MixedStream:
    """Sends each query to all teachers and mixes their distributions by weight."""

    def __init__(
        self, streams: Mapping[str, TargetStream], weights: Mapping[str, float], *, vocab_size: int
    ) -> None:
        self._streams = list(streams.values())
        self._weights = [weights[name] for name in streams]
        self._vocab_size = vocab_size

    @property
    def num_asked(self) -> int:
        """Sequences sent to teachers, counted for each of them."""
        return sum(stream.num_asked for stream in self._streams)

    def submit(self, sequence_id: int, query: TeacherQuery) -> None:
        """Sends a query to every teacher."""
        for stream in self._streams:
            stream.submit(sequence_id, query)

    def take(self, sequence_id: int, patience: Patience) -> Distributions:
        """Waits for the mixture. Raises what the teachers' streams raise."""
        parts = [stream.take(sequence_id, patience) for stream in self._streams]
        return mix(parts, self._weights, vocab_size=self._vocab_size)

    def close(self) -> None:
        """Ends the streams."""
        for stream in self._streams:
            stream.close()
