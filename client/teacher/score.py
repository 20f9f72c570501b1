"""Scores sequences over one stream at a time, with a bounded window; a lost stream is opened again."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.client.core.connection import OnLost
from stillhouse.client.teacher.connection import TeacherConnection
from stillhouse.client.teacher.generate import as_ids
from stillhouse.client.teacher.replica import TeacherReplica, tell
from stillhouse.protos.errors import Reason, StillhouseError, from_status
from stillhouse.protos.rpc.pool.bounded_wait import BoundedWait
from stillhouse.protos.rpc.pool.replica import PoolOptions
from stillhouse.protos.rpc.pool.service_pool import Call, ServicePool
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tensors.distributions import Distributions, decode_distributions
from stillhouse.protos.tensors.layout import encode


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreItem:
    """A sequence to score."""

    id: Hashable
    """Any value; returned with the result."""
    token_ids: Any
    """Token ids [T], any sequence of integers."""
    start: int = 1
    """First position to score: a prompt of P tokens needs nothing before P."""
    adapter: str = ""
    """Adapter to apply; empty means the base model."""
    query_token_ids: NDArray[np.int32] | None = None
    """Ids to report query_logprobs for, [T - start, Q], -1 where a row has fewer."""
    timeout_s: float = 0.0
    """Time after which it fails with ITEM_TIMEOUT; 0 means the contract's 300 seconds."""


Sequenced = ScoreItem | tuple[Hashable, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreAnswer:
    """The answer to one sequence: distributions, or an error."""

    id: Hashable
    """The sequence's id."""
    distributions: Distributions | None
    """Rows from `start` to the end; None after an error."""
    error: StillhouseError | None
    """The reason for which this sequence, and only this one, was not scored."""


def score(
    teacher: TeacherConnection,
    sequences: Iterable[Sequenced],
    config: teacher_pb2.DistributionConfig,
    *,
    max_inflight: int,
    on_lost: OnLost | None,
    patience_s: float,
) -> Iterator[ScoreAnswer]:
    """Yields the results of `sequences`; see Teacher.score."""
    limit = max(1, teacher.limits.max_inflight_sequences)
    window = min(max_inflight, limit) if max_inflight > 0 else limit
    yield from _Scorer(teacher, sequences, config, window, on_lost).answers(BoundedWait(patience_s))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sent:
    id: Hashable
    token_ids: NDArray[np.int32]
    start: int
    request: teacher_pb2.ScoreRequest


class _Scorer:
    """A pool of one service: at most `window` sequences are in flight, and a thread reads the caller's iterable."""

    def __init__(
        self,
        teacher: TeacherConnection,
        sequences: Iterable[Sequenced],
        config: teacher_pb2.DistributionConfig,
        window: int,
        on_lost: OnLost | None,
    ) -> None:
        self._config = config
        self._failure: BaseException | None = None
        self._has_answered = False
        self._pool: ServicePool[_Sent, ScoreAnswer, TeacherReplica] = ServicePool(
            [TeacherReplica(teacher)],
            self._serve,
            # A stream that never answered is not opened again.
            PoolOptions(
                name="score",
                window=window,
                is_passing=lambda error, _: error.retryable and self._has_answered,
            ),
            on_lost=tell(on_lost),
        )
        threading.Thread(target=self._read, args=(sequences,), name="score-reader", daemon=True).start()

    def answers(self, wait: BoundedWait) -> Iterator[ScoreAnswer]:
        """Yields results as they arrive, then raises the error of the caller's iterable, if any."""
        try:
            while not self._pool.is_done:
                result = self._pool.poll(wait)
                if result is not None and isinstance(result[1], ScoreAnswer):
                    yield result[1]
        except StillhouseError:
            if self._failure is None:
                raise
        finally:
            self._pool.close()
        if self._failure is not None:
            raise self._failure

    def _read(self, sequences: Iterable[Sequenced]) -> None:
        try:
            for number, sequence in enumerate(sequences):
                if not self._pool.put_when_room(number, _sent(number, sequence)):
                    return
        except BaseException as error:
            self._failure = error
        finally:
            self._pool.complete()

    def _serve(self, replica: TeacherReplica, call: Call[_Sent, ScoreAnswer]) -> None:
        """Keeps one stream open; a partially received sequence is scored again."""
        parts: dict[int, list[Distributions]] = {}
        with replica.errors():
            stream = replica.teacher.stub.Score(self._requests(call))
            call.on_cancel(stream.cancel)
            try:
                for response in stream:
                    for result in response.results:
                        self._accept(call, result, parts, replica.teacher.limits.vocab_size)
            finally:
                stream.cancel()

    def _requests(self, call: Call[_Sent, ScoreAnswer]) -> Iterator[teacher_pb2.ScoreRequest]:
        yield teacher_pb2.ScoreRequest(config=self._config)
        while (found := call.next_item()) is not None:
            yield found[1].request

    def _accept(
        self,
        call: Call[_Sent, ScoreAnswer],
        result: teacher_pb2.ScoreResult,
        parts: dict[int, list[Distributions]],
        vocab_size: int,
    ) -> None:
        number = result.sequence_id
        sent = call.item(number)
        if sent is None:
            raise StillhouseError(
                Reason.TENSOR_INVALID,
                f"the teacher sent a result of sequence {number}, which is not in flight.",
            )
        before = parts.setdefault(number, [])
        if result.HasField("distributions"):
            rows = decode_distributions(
                result.distributions,
                vocab_size=vocab_size,
                max_rows=len(sent.token_ids) - sum(each.num_rows for each in before),
                max_top_k=self._config.top_k,
            )
            before.append(rows)
            if not (rows.num_rows or result.last):  # such parts could go on for ever
                raise StillhouseError(
                    Reason.TENSOR_INVALID, f"the teacher sent a part without rows of sequence {number}."
                )
        if result.last or result.HasField("error"):
            self._has_answered = True
            call.answer(number, _answer(sent, parts.pop(number), result))


def _answer(sent: _Sent, parts: list[Distributions], result: teacher_pb2.ScoreResult) -> ScoreAnswer:
    if result.HasField("error"):
        return ScoreAnswer(id=sent.id, distributions=None, error=from_status(result.error))
    whole = Distributions.concat(parts)
    expected = len(sent.token_ids) - sent.start
    if whole.start != sent.start or whole.num_rows != expected:
        raise StillhouseError(
            Reason.TENSOR_INVALID,
            f"the teacher sent {whole.num_rows} rows from position {whole.start} for a sequence with {expected} rows "
            f"from {sent.start}.",
        )
    return ScoreAnswer(id=sent.id, distributions=whole, error=None)


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
