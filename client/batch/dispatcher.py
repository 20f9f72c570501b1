"""Rows through the teacher: a bounded number of samples in flight over a few Generate calls, yielded as they finish.

A call that breaks off costs nothing but time: its missing samples are requested again, from a service that is checked to
be the same teacher, and no sample twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from stillhouse.client.batch.input_rows import PromptRow
from stillhouse.client.core.connection import PATIENCE_S, OnLost
from stillhouse.client.teacher.generate import Completion, Gathering, piece_of
from stillhouse.client.teacher.replica import TeacherReplica, tell
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.pool.bounded_wait import BoundedWait
from stillhouse.protos.rpc.pool.replica import PoolOptions
from stillhouse.protos.rpc.pool.service_pool import Call, ServicePool
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor

if TYPE_CHECKING:
    from stillhouse.client.teacher.connection import TeacherConnection
    from stillhouse.client.teacher.teacher import Teacher

MAX_INFLIGHT = 1024
"""Samples in flight at each service: a few times what an engine writes side by side, so that it never waits."""
CALL_SHARE = 8
"""A call is opened once this share of the samples is missing."""
MAX_REQUEST_BYTES = 1 << 20
"""Prompts of one call, unless one alone is larger."""
MAX_CALLS = 24
"""Calls at once to one service."""
MAX_ATTEMPTS = 8
"""Attempts for each sample; more suggest an input that crashes the teacher."""
_BUSY = frozenset({Reason.TOO_MANY_CALLS, Reason.TEACHER_LOADING, Reason.DRAINING})
"""Reasons of a teacher that takes nothing; they are no attempt."""
_BROKEN = frozenset({Reason.INTERNAL, Reason.CANCELLED})
"""Reasons of a broken call that are not retryable in general."""

Key = tuple[int, int]
"""Prompt of a row, and sample of that prompt."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class RowResult:
    """One row with all its samples."""

    row: PromptRow
    completions: dict[Key, Completion] = field(default_factory=dict)
    """By prompt and sample; empty for a row that cannot be sent."""

    @property
    def error(self) -> StillhouseError | None:
        """The row's own error, or the first of its samples'."""
        if self.row.error is not None:
            return self.row.error
        return next((each.error for _, each in sorted(self.completions.items()) if each.error), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    """One sample of a prompt of a row: the pool's item."""

    pending: RowResult
    prompt: int
    sample: int


class BatchDispatcher:
    """Results of rows, in the order in which they are ready."""

    def __init__(
        self,
        teachers: Sequence[Teacher],
        rows: Iterator[PromptRow | None],
        *,
        verify: Callable[[TeacherConnection], None] = lambda _: None,
        top_k: int | None = None,
        max_inflight: int = MAX_INFLIGHT,
        on_lost: OnLost | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`teachers` are services of one teacher. `rows` are read in the caller's thread; None: there are none at the moment.

        With `top_k` every request has that many candidates at each position, as float16, and its prompts' ids.
        `verify` runs before a lost service is used again, and raises if it is another teacher.
        """
        self._rows: Iterator[PromptRow | None] | None = rows
        self._top_k = top_k
        self._share = max(1, max_inflight // CALL_SHARE)
        self._wait = BoundedWait(patience_s)
        self._ids = itertools.count()
        self._samples: dict[int, _Sample] = {}
        self._pool: ServicePool[_Sample, Completion, TeacherReplica] = ServicePool(
            [TeacherReplica(each, verify) for each in teachers],
            self._serve,
            PoolOptions(
                name="batch-call",
                max_calls=MAX_CALLS,
                window=max_inflight,
                chunk=self._share,
                max_attempts=MAX_ATTEMPTS,
                counts=lambda error: error.reason not in _BUSY,
                is_passing=lambda error, _: error.retryable or error.reason in _BROKEN,
            ),
            on_lost=tell(on_lost),
        )
        self.tokens = 0
        """Tokens that were generated."""

    def results(self) -> Iterator[RowResult]:
        """Yields the results; closing the iterator aborts what is in flight.

        Raises StillhouseError for what concerns the batch as a whole: a teacher that refuses the calls, that does not
        respond for `patience_s` seconds, or that is another one than before.
        """
        try:
            while not self._pool.is_done:
                yield from self._read()
                result = self._pool.poll(self._wait)
                if result is not None:
                    yield from self._finish(*result)
        finally:
            self._pool.close()

    def _read(self) -> Iterator[RowResult]:
        """Reads rows while a service has room for another call; rows without a prompt are results at once."""
        while self._rows is not None and self._pool.has_room(self._share):
            samples: dict[int, _Sample] = {}
            row: PromptRow | None = None
            while len(samples) < self._share:
                try:
                    row = next(self._rows)
                except StopIteration:
                    self._rows = None
                    break
                if row is None:
                    break
                if row.num_completions == 0:
                    yield RowResult(row=row)
                    continue
                pending = RowResult(row=row)
                for prompt, sample in itertools.product(range(len(row.prompts)), range(row.num_samples)):
                    samples[next(self._ids)] = _Sample(pending=pending, prompt=prompt, sample=sample)
            self._samples |= samples
            self._pool.put(samples)
            if self._rows is None:
                self._pool.complete()
            if row is None:
                return

    def _serve(self, replica: TeacherReplica, call: Call[_Sample, Completion]) -> None:
        """Makes one Generate call for the samples that the service is given."""
        limits = replica.teacher.limits
        samples = call.take(
            _Selection(max_samples=self._share, max_prompts=limits.max_prompts, top_k=self._columns)
        )
        if not samples:
            return
        request, waiting = self._request(samples)
        gathering = Gathering()
        with replica.errors():
            stream = replica.teacher.stub.Generate(request)
            call.on_cancel(stream.cancel)
            for response in stream:
                for chunk in response.chunks:
                    key = chunk.prompt_index, chunk.sample_index
                    if key not in waiting:
                        raise StillhouseError(
                            Reason.TENSOR_INVALID,
                            f"the teacher sent sample {key[1]} of prompt {key[0]}, which was not requested or is complete.",
                        )
                    completion = gathering.add(piece_of(chunk, limits, request))
                    if completion is None:
                        continue
                    if completion.error is not None and completion.error.retryable:
                        replica.is_ready = False
                        call.retry(waiting.pop(key), completion.error)
                    else:
                        call.answer(waiting.pop(key), completion)

    def _request(self, samples: Mapping[int, _Sample]) -> tuple[teacher_pb2.GenerateRequest, dict[Key, int]]:
        """Returns the message for samples of equal top_k, and their ids by their indices in it."""
        request = teacher_pb2.GenerateRequest(num_samples=1, whole_samples=True)
        request.prompt_token_ids = self._top_k is not None
        top_k = self._columns(next(iter(samples.values())))
        if top_k is not None:
            request.distributions.top_k = top_k
            request.distributions.logprob_dtype = (
                Tensor.DATA_TYPE_FLOAT32 if self._top_k is None else Tensor.DATA_TYPE_FLOAT16
            )
        indices: dict[tuple[RowResult, int], int] = {}
        waiting: dict[Key, int] = {}
        for sample_id, each in samples.items():
            index = indices.setdefault((each.pending, each.prompt), len(indices))
            if index == len(request.prompts):
                request.prompts.append(each.pending.row.prompts[each.prompt])
            request.prompts[index].sample_indices.append(each.sample)
            waiting[index, each.sample] = sample_id
        for prompt in request.prompts:
            if prompt.sample_indices == [0]:  # the default
                del prompt.sample_indices[:]
        return request, waiting

    def _columns(self, sample: _Sample) -> int | None:
        wanted = [each for each in (self._top_k, sample.pending.row.top_logprobs) if each is not None]
        return max(wanted, default=None)

    def _finish(self, sample_id: int, result: Completion | StillhouseError) -> Iterator[RowResult]:
        sample = self._samples.pop(sample_id)
        if isinstance(result, StillhouseError):
            result = Completion(prompt_index=sample.prompt, sample_index=sample.sample, error=result)
        self.tokens += len(result.token_ids)
        pending = sample.pending
        pending.completions[sample.prompt, sample.sample] = result
        if len(pending.completions) == pending.row.num_completions:
            yield pending


class _Selection:
    """Chooses the samples of one call: of equal top_k, and within the limits of one request."""

    def __init__(self, *, max_samples: int, max_prompts: int, top_k: Callable[[_Sample], int | None]) -> None:
        self._left = max_samples
        self._max_prompts = max(1, max_prompts)
        self._top_k = top_k
        self._first: _Sample | None = None
        self._sizes: dict[tuple[RowResult, int], int] = {}
        """Bytes of the chosen prompts."""

    def __call__(self, sample: _Sample) -> bool:
        """Accepts a sample, or leaves it to the next call."""
        if not self._left or (self._first and self._top_k(self._first) != self._top_k(sample)):
            return False
        key = sample.pending, sample.prompt
        if key not in self._sizes:
            size = sample.pending.row.prompts[sample.prompt].ByteSize()
            is_over = sum(self._sizes.values()) + size > MAX_REQUEST_BYTES
            if self._first and (is_over or len(self._sizes) == self._max_prompts):
                return False
            self._sizes[key] = size
        self._first = self._first or sample
        self._left -= 1
        return True
