"""Scores sequences over one stream at a time: a bounded window of unanswered ones, sent again when a stream is lost."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.client.core.connection import OnLost, Patience
from stillhouse.client.teacher.generate import as_ids
from stillhouse.protos.errors import Reason, StillhouseError, from_status
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tensors.distributions import Distributions, decode_distributions
from stillhouse.protos.tensors.layout import encode

if TYPE_CHECKING:
    from stillhouse.client.teacher.teacher import Teacher


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreItem:
    """A sequence to score."""

    id: Hashable
    """Anything; it comes back with the answer."""
    token_ids: Any
    """Token ids [T], any sequence of whole numbers."""
    start: int = 1
    """First position to score: a prompt of P tokens needs nothing before P."""
    adapter: str = ""
    """Adapter to apply; empty means the base model."""
    query_token_ids: NDArray[np.int32] | None = None
    """Ids to report query_logprobs for, [T - start, Q], -1 where a row has fewer."""
    timeout_s: float = 0.0
    """Time after which it is answered with ITEM_TIMEOUT; 0 means the contract's 300 seconds."""


Sequenced = ScoreItem | tuple[Hashable, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreAnswer:
    """What came back for one sequence: distributions, or an error."""

    id: Hashable
    """The sequence's id."""
    distributions: Distributions | None
    """Rows from `start` to the end; None after an error."""
    error: StillhouseError | None
    """Why this sequence, and only this one, was not scored."""


def score(
    teacher: Teacher,
    sequences: Iterable[Sequenced],
    config: teacher_pb2.DistributionConfig,
    *,
    max_inflight: int,
    on_lost: OnLost | None,
    patience_s: float,
) -> Iterator[ScoreAnswer]:
    """The answers to `sequences`; see Teacher.score."""
    limit = max(1, teacher.limits.max_inflight_sequences)
    window = _Window(sequences, min(max_inflight, limit) if max_inflight > 0 else limit)
    patience = Patience(patience_s)
    try:
        while True:
            try:
                for answer in _answers(teacher, window, config):
                    patience.answered()
                    yield answer
            except StillhouseError as error:
                if window.is_failed or not error.retryable or not window.has_answered:
                    window.raise_failure()
                    raise
                patience.wait(error, on_lost)
            else:
                window.raise_failure()
                if window.is_answered:
                    return
                closed = StillhouseError(
                    Reason.TEACHER_UNREACHABLE,
                    f"The teacher at {teacher.target} closed the stream before every sequence was answered.",
                )
                patience.wait(closed, on_lost)
    finally:
        window.close()


def _answers(
    teacher: Teacher, window: _Window, config: teacher_pb2.DistributionConfig
) -> Iterator[ScoreAnswer]:
    """Answers from one stream. A sequence of which only parts came stays in the window."""
    parts: dict[int, list[Distributions]] = {}
    with window.requests(config) as requests:
        for response in teacher.stream(teacher.stub.Score, requests):
            for result in response.results:
                number = result.sequence_id
                item = window.item(number)
                if result.HasField("distributions"):
                    rows = decode_distributions(
                        result.distributions,
                        vocab_size=teacher.limits.vocab_size,
                        max_rows=len(item.token_ids) - sum(each.num_rows for each in parts.get(number, [])),
                        max_top_k=config.top_k,
                    )
                    parts.setdefault(number, []).append(rows)
                if result.last or result.HasField("error"):
                    window.answered(number)
                    yield _answer(item, parts.pop(number, []), result)


def _answer(item: _Sent, parts: list[Distributions], result: teacher_pb2.ScoreResult) -> ScoreAnswer:
    if result.HasField("error"):
        return ScoreAnswer(id=item.id, distributions=None, error=from_status(result.error))
    whole = Distributions.concat(parts)
    expected = len(item.token_ids) - item.start
    if whole.start != item.start or whole.num_rows != expected:
        raise StillhouseError(
            Reason.TENSOR_INVALID,
            f"the teacher answered {whole.num_rows} rows from position {whole.start} for a sequence with {expected} rows "
            f"from {item.start}.",
        )
    return ScoreAnswer(id=item.id, distributions=whole, error=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sent:
    id: Hashable
    token_ids: NDArray[np.int32]
    start: int
    request: teacher_pb2.ScoreRequest


class _Window:
    """Unanswered sequences, at most `limit`, by the number that they have on the wire.

    One thread reads the caller's iterable, gRPC's threads take requests out, and the caller's thread takes answers off.
    """

    def __init__(self, sequences: Iterable[Sequenced], limit: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._unanswered: dict[int, _Sent] = {}
        self._is_read = False
        self._is_closed = False
        self._failure: BaseException | None = None
        self._stream: object = None
        self.has_answered = False
        reader = threading.Thread(target=self._read, args=(sequences,), name="score-reader", daemon=True)
        reader.start()

    def _read(self, sequences: Iterable[Sequenced]) -> None:
        try:
            for number, sequence in enumerate(sequences):
                sent = _sent(number, sequence)
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closed or len(self._unanswered) < self._limit)
                    if self._is_closed:
                        return
                    self._unanswered[number] = sent
                    self._changed.notify_all()
        except BaseException as error:
            self._failure = error
        finally:
            with self._changed:
                self._is_read = True
                self._changed.notify_all()

    def requests(self, config: teacher_pb2.DistributionConfig) -> _Requests:
        """What a stream sends: `config`, every unanswered sequence, then more as they come."""
        return _Requests(self, config)

    def next_after(self, number: int, stream: object) -> tuple[int, _Sent] | None:
        """The unanswered sequence after `number`, waiting for one; None if `stream` is to end."""
        with self._changed:
            while True:
                if self._is_closed or self._stream is not stream:
                    return None
                found = next(((each, sent) for each, sent in self._unanswered.items() if each > number), None)
                if found is not None or self._is_read:
                    return found
                self._changed.wait()

    def set_stream(self, stream: object) -> None:
        """Makes `stream` the one that sends; the one before ends."""
        with self._changed:
            self._stream = stream
            self._changed.notify_all()

    def item(self, number: int) -> _Sent:
        """The unanswered sequence `number`. Raises StillhouseError if there is none."""
        with self._changed:
            sent = self._unanswered.get(number)
        if sent is None:
            raise StillhouseError(
                Reason.TENSOR_INVALID,
                f"the teacher answered sequence {number}, which is not waiting for an answer.",
            )
        return sent

    def answered(self, number: int) -> None:
        """Makes room for another sequence."""
        with self._changed:
            self.has_answered = True
            del self._unanswered[number]
            self._changed.notify_all()

    @property
    def is_answered(self) -> bool:
        """Whether every sequence was read and answered."""
        with self._changed:
            return self._is_read and not self._unanswered

    @property
    def is_failed(self) -> bool:
        """Whether the caller's iterable raised."""
        return self._failure is not None

    def raise_failure(self) -> None:
        """Raises what the caller's iterable raised, if it did."""
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Ends the reading thread and every stream's requests."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


class _Requests:
    """The requests of one stream; leaving the context ends them."""

    def __init__(self, window: _Window, config: teacher_pb2.DistributionConfig) -> None:
        self._window = window
        self._config: teacher_pb2.DistributionConfig | None = config
        self._last = -1

    def __enter__(self) -> _Requests:
        self._window.set_stream(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._window.set_stream(None)

    def __iter__(self) -> _Requests:
        return self

    def __next__(self) -> teacher_pb2.ScoreRequest:
        if self._config is not None:
            config, self._config = self._config, None
            return teacher_pb2.ScoreRequest(config=config)
        found = self._window.next_after(self._last, self)
        if found is None:
            raise StopIteration
        self._last, sent = found
        return sent.request


def _sent(number: int, sequence: Sequenced) -> _Sent:
    item = sequence if isinstance(sequence, ScoreItem) else ScoreItem(id=sequence[0], token_ids=sequence[1])
    token_ids = as_ids(item.token_ids)
    message = teacher_pb2.ScoreSequence(
        sequence_id=number,
        token_ids=encode(token_ids),
        start=item.start,
        adapter=item.adapter,
        timeout_ms=round(item.timeout_s * 1000),
    )
    if item.query_token_ids is not None:
        message.query_token_ids.CopyFrom(encode(item.query_token_ids.astype(np.int32)))
    return _Sent(
        id=item.id,
        token_ids=token_ids,
        start=max(1, item.start),
        request=teacher_pb2.ScoreRequest(sequence=message),
    )
