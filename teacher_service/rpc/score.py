"""One Score call: each sequence gets its own response or error, and the number of unanswered ones is bounded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace

from stillhouse.protos.errors import Reason, StillhouseError, to_status
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.classes import encode_classes
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.admission.response_budget import CallBudget, response_bytes
from stillhouse.teacher_service.engine import DistributionOptions, Int32Array
from stillhouse.teacher_service.rpc.response_batcher import PART_BYTES, ResponseBatcher, cancel_all
from stillhouse.teacher_service.rpc.score_validation import (
    WireFormat,
    check_distributions,
    check_sequence,
    invalid_request,
    require_scores,
)
from stillhouse.teacher_service.rpc.service_state import ServiceState

DEFAULT_TIMEOUT_MS = 300_000
DRAIN_RETRY_S = 2.0
_OVERHEAD_BYTES = 1024
"""Fields of a part beside its numbers."""


@dataclass(frozen=True, slots=True)
class _ResultPart:
    """Part of a sequence's result; the last part makes room for another sequence."""

    result: teacher_pb2.ScoreResult
    owns_id: bool
    num_bytes: int = 0
    """Bytes released from the call's budget once sent."""


class ScoreSession:
    """State of one call; nothing outlives it."""

    def __init__(
        self, serving: ServiceState, requests: AsyncIterator[teacher_pb2.ScoreRequest], *, client: str
    ) -> None:
        self._serving = serving
        self._requests = requests
        self._client = client
        self._unread = CallBudget(serving.budget)
        self._batcher: ResponseBatcher[_ResultPart] = ResponseBatcher()
        self._room = asyncio.Semaphore(serving.config.max_inflight_sequences)
        self._unanswered: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def responses(self) -> AsyncGenerator[teacher_pb2.ScoreResponse, None]:
        """Yields the messages of the call. Closing it cancels its work in the engine."""
        reader = asyncio.create_task(self._read_all())
        try:
            async with aclosing(self._batcher.batches()) as batches:
                async for parts in batches:
                    for part in parts:
                        # Before the message leaves: its reader may reuse the id at once.
                        if part.result.last and part.owns_id:
                            self._unanswered.discard(part.result.sequence_id)
                    yield teacher_pb2.ScoreResponse(results=[part.result for part in parts])
                    # Here the transport has taken the message; it waits for a slow caller.
                    for part in parts:
                        self._unread.release(part.num_bytes)
                        if part.result.last:
                            self._room.release()
        finally:
            await cancel_all({reader, *self._tasks})
            self._unread.release_all()

    async def _read_all(self) -> None:
        error: Exception | None = None
        try:
            options, wire = await self._read_config()
            await self._read_sequences(options, wire)
        except Exception as refused:
            error = refused
        # Sequences already read are answered even if the call then fails.
        outcomes = await asyncio.gather(*self._tasks, return_exceptions=True)
        bugs = [outcome for outcome in outcomes if isinstance(outcome, Exception)]
        self._batcher.end(error or (bugs[0] if bugs else None))

    async def _read_config(self) -> tuple[DistributionOptions, WireFormat]:
        first = await anext(self._requests, None)
        if first is None or first.WhichOneof("request") != "config":
            raise invalid_request(
                "The first message of a Score call must carry config, and this one does not.",
            )
        require_scores(self._serving.info)
        options, wire = check_distributions(first.config, self._serving.info)
        return options, wire

    async def _read_sequences(self, options: DistributionOptions, wire: WireFormat) -> None:
        while True:
            await self._room.acquire()
            request = await self._next_request()
            if request is None:
                return
            if request.WhichOneof("request") != "sequence":
                raise invalid_request(
                    "Every message of a Score call after the first must carry a sequence. Open another call for another "
                    "config.",
                )
            self._serving.counters.sequences_received += 1
            task = asyncio.create_task(self._handle(request.sequence, options, wire))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _next_request(self) -> teacher_pb2.ScoreRequest | None:
        """Reads the next message; None at the caller's end. Raises DRAINING when the service stops instead."""
        if not self._serving.draining.is_set():
            reading = asyncio.ensure_future(anext(self._requests, None))
            draining = asyncio.create_task(self._serving.draining.wait())
            try:
                await asyncio.wait({reading, draining}, return_when=asyncio.FIRST_COMPLETED)
                if reading.done():
                    return reading.result()
            finally:
                reading.cancel()
                draining.cancel()
        raise StillhouseError(
            Reason.DRAINING,
            "This teacher is stopping; every sequence that it read is answered. Send the others again when it is back.",
            retry_after_s=DRAIN_RETRY_S,
        )

    async def _handle(
        self, sequence: teacher_pb2.ScoreSequence, options: DistributionOptions, wire: WireFormat
    ) -> None:
        began = time.monotonic()
        sequence_id = sequence.sequence_id
        owns_id = sequence_id not in self._unanswered
        self._unanswered.add(sequence_id)
        num_bytes = self._num_bytes(sequence, options)
        # Outside the sequence's timeout: it does not run while the caller does not read.
        await self._unread.reserve(num_bytes)
        try:
            scored = await self._score(sequence, options, owns_id)
        except Exception as error:
            self._serving.counters.sequences_refused += 1
            result = teacher_pb2.ScoreResult(sequence_id=sequence_id, error=to_status(error), last=True)
            self._batcher.put(_ResultPart(result, owns_id, num_bytes), result.ByteSize())
            return
        num_rows = scored.rows.num_rows
        self._serving.counters.tokens_scored += num_rows
        self._serving.throughput.scored(self._client, num_rows)
        self._serving.counters.scoring_seconds += time.monotonic() - began
        for result in _results(sequence_id, scored, options, wire):
            part = _ResultPart(result, owns_id, num_bytes if result.last else 0)
            self._batcher.put(part, result.ByteSize())

    def _num_bytes(self, sequence: teacher_pb2.ScoreSequence, options: DistributionOptions) -> int:
        """Estimates the bytes of a response from an unvalidated request."""
        shape, query_shape = sequence.token_ids.shape, sequence.query_token_ids.shape
        info = self._serving.info
        num_rows = min(shape[0] - sequence.start, info.max_sequence_tokens) if len(shape) == 1 else 0
        num_queries = min(query_shape[1], info.max_query_tokens) if len(query_shape) == 2 else 0
        if options.classes:
            num_rows = min(shape[0], info.max_sequence_tokens) if len(shape) == 1 else 0
        return response_bytes(
            max(0, num_rows), options, num_queries=max(0, num_queries), hidden_size=info.hidden_size
        )

    async def _score(
        self, sequence: teacher_pb2.ScoreSequence, options: DistributionOptions, owns_id: bool
    ) -> _Scored:
        if not owns_id:
            raise invalid_request(
                f"sequence_id {sequence.sequence_id} is still unanswered. Give concurrent sequences different ids."
            )
        timeout_ms = sequence.timeout_ms or DEFAULT_TIMEOUT_MS
        if timeout_ms < 0:
            raise invalid_request(
                f"timeout_ms is {timeout_ms}. Give a number above 0, or 0 for the default.",
            )
        try:
            async with asyncio.timeout(timeout_ms / 1000):
                item = check_sequence(sequence, options, self._serving.info)
                reused: list[int] = []
                item = replace(item, on_reused=reused.append)
                cost = self._serving.capacity.score_cost(len(item.token_ids))
                async with (
                    self._serving.adapters.use(item.adapter),
                    self._serving.admission.turn(self._client, cost),
                ):
                    rows = await self._serving.engine.score(item)
        except TimeoutError as error:
            raise StillhouseError(
                Reason.ITEM_TIMEOUT,
                f"The sequence was not scored within {timeout_ms} ms. The teacher is busy: send fewer at once, or give a "
                "longer timeout_ms.",
                metadata={"timeout_ms": str(timeout_ms)},
            ) from error
        coded = sequence.query_token_ids.dtype == Tensor.DATA_TYPE_DIFFERENCES
        return _Scored(
            rows=rows,
            queried=item.query_token_ids if coded else None,
            num_reused=reused[-1] if reused else None,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scored:
    """A sequence's rows."""

    rows: Distributions
    queried: Int32Array | None
    """Ids that were queried as DIFFERENCES."""
    num_reused: int | None
    """Tokens that the prefix cache held; None from an engine without one."""


def _results(
    sequence_id: int, scored: _Scored, options: DistributionOptions, wire: WireFormat
) -> Iterator[teacher_pb2.ScoreResult]:
    """The messages of a sequence's rows, each of at most PART_BYTES where a row fits into that; the last one says so."""
    rows, queried = scored.rows, scored.queried
    if options.classes:
        parts = [
            teacher_pb2.ScoreResult(sequence_id=sequence_id, classes=each)
            for each in encode_classes(rows, part_bytes=PART_BYTES - _OVERHEAD_BYTES)
        ]
        parts[-1].last = True
        yield from parts
        return
    step = max(1, PART_BYTES // (rows.row_bytes + 1))
    for begin in range(0, rows.num_rows, step):
        end = min(begin + step, rows.num_rows)
        is_last = end == rows.num_rows
        yield teacher_pb2.ScoreResult(
            sequence_id=sequence_id,
            distributions=wire.encode(rows.rows(begin, end), None if queried is None else queried[begin:end]),
            last=is_last,
            reused_tokens=scored.num_reused if is_last else None,
        )
