"""Rows through the teacher: a bounded number of samples in flight over a few Generate calls, answered as they finish.

A call that breaks off costs nothing but time: what it had not answered is asked for again, on a service that is checked
to be the same teacher, and no sample twice.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

from stillhouse.client.batch.input_rows import Row
from stillhouse.client.batch.service_pool import Member, Pool
from stillhouse.client.core.connection import PATIENCE_S, OnLost
from stillhouse.client.teacher.generate import Completion, Gathering, failed, piece_of
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor

if TYPE_CHECKING:
    from stillhouse.client.teacher.teacher import Teacher

MAX_INFLIGHT = 1024
"""Samples in flight at each service: a few times what an engine writes side by side, so that it never waits."""
CALL_SHARE = 8
"""A call is opened once this share of the samples is missing."""
MAX_REQUEST_BYTES = 1 << 20
"""Prompts of one call, unless one alone is larger."""
MAX_UNREAD = 64
"""Messages that wait to be looked at; then the teacher waits."""
MAX_ATTEMPTS = 8
"""Times that a sample is asked for: what is lost with its teacher so often may be what the teacher dies of."""
_BUSY = frozenset({Reason.TOO_MANY_CALLS, Reason.TEACHER_LOADING, Reason.DRAINING})
"""Why a teacher takes nothing; that says nothing of what it was asked."""
_CLOSE_S = 5.0
_LISTEN_S = 0.5
"""A Ctrl-C that falls between two instructions is seen so much later."""

Key = tuple[int, int]
"""Prompt of a row, and sample of that prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One row with all its samples."""

    row: Row
    completions: dict[Key, Completion]
    """By prompt and sample; empty for a row that could not be asked for."""

    @property
    def error(self) -> StillhouseError | None:
        """Why the row failed: its own error, or the first of its samples'."""
        if self.row.error is not None:
            return self.row.error
        return next((each.error for _, each in sorted(self.completions.items()) if each.error), None)


@dataclass(eq=False, kw_only=True, slots=True)
class _Work:
    """A row on its way."""

    row: Row
    completions: dict[Key, Completion] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ask:
    """Samples of one prompt of a row that are to be asked for together."""

    work: _Work
    prompt: int
    samples: tuple[int, ...]
    attempts: int = 0


@dataclass(eq=False, kw_only=True, slots=True)
class _Call:
    """One Generate call."""

    member: Member
    request: teacher_pb2.GenerateRequest
    asks: list[_Ask]
    unanswered: set[Key]
    """Index of the ask, and sample."""
    gathering: Gathering = field(default_factory=Gathering)
    stream: Any = None
    thread: threading.Thread | None = None


@dataclass(frozen=True, slots=True)
class _End:
    error: StillhouseError | None


class Flow:
    """Answers to rows, in the order in which they are ready."""

    def __init__(
        self,
        teachers: Sequence[Teacher],
        rows: Iterator[Row | None],
        *,
        verify: Callable[[Teacher], None] = lambda _: None,
        top_k: int | None = None,
        max_inflight: int = MAX_INFLIGHT,
        on_lost: OnLost | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`teachers` are services of one teacher. `rows` are read in the caller's thread; None: there are none at the moment.

        With `top_k` all are asked for that many candidates at each position, as float16, and for their prompts' ids.
        `verify` is called before a service that was lost is asked again: it raises if that is another teacher.
        """
        self._pool = Pool(teachers, verify=verify, on_lost=on_lost, patience_s=patience_s)
        self._rows: Iterator[Row | None] | None = rows
        self._top_k = top_k
        self._max_inflight = max_inflight
        self._again: deque[_Ask] = deque()
        self._calls: set[_Call] = set()
        self._events: queue.Queue[tuple[_Call, teacher_pb2.GenerateResponse | _End]] = queue.Queue(MAX_UNREAD)
        self._closed = threading.Event()
        self._opening = threading.Lock()
        self.tokens = 0
        """Tokens that were written."""

    def answers(self) -> Iterator[Answer]:
        """The answers; closing the iterator aborts what is in flight.

        Raises StillhouseError for what concerns the batch as a whole: a teacher that refuses the calls, that nobody
        reaches for `patience_s` seconds, or that is another one than before.
        """
        try:
            while True:
                yield from self._fill()
                if not self._calls and not self._again and self._rows is None:
                    return
                event = self._next_event()
                if event is None:
                    continue
                call, said = event
                if isinstance(said, _End):
                    yield from self._ended(call, said.error)
                else:
                    yield from self._take(call, said)
        finally:
            self._close()

    def _fill(self) -> Iterator[Answer]:
        """Opens calls until enough is in flight; rows that ask for nothing are answered at once."""
        share = max(1, self._max_inflight // CALL_SHARE)
        while (member := self._pool.choose(share, self._max_inflight)) is not None:
            self._read(share)
            while self._again and not self._again[0].samples:
                ask = self._again.popleft()
                yield Answer(row=ask.work.row, completions={})
            if not self._again:
                return
            if self._pool.is_reachable(member):
                self._open(share, member)

    def _read(self, share: int) -> None:
        waiting = sum(max(1, len(ask.samples)) for ask in self._again)
        while self._rows is not None and waiting < share:
            try:
                row = next(self._rows)
            except StopIteration:
                self._rows = None
                return
            if row is None:
                return
            work = _Work(row=row)
            if row.num_answers == 0:
                self._again.append(_Ask(work=work, prompt=0, samples=()))
                waiting += 1
                continue
            for prompt in range(len(row.prompts)):
                for begin in range(0, row.num_samples, share):
                    samples = tuple(range(begin, min(begin + share, row.num_samples)))
                    self._again.append(_Ask(work=work, prompt=prompt, samples=samples))
                    waiting += len(samples)

    def _open(self, share: int, member: Member) -> None:
        limits = member.teacher.limits
        top_k = self._columns(self._again[0])
        request = teacher_pb2.GenerateRequest(num_samples=1, whole_samples=True)
        if top_k is not None:
            request.distributions.top_k = top_k
            request.distributions.logprob_dtype = (
                Tensor.DATA_TYPE_FLOAT32 if self._top_k is None else Tensor.DATA_TYPE_FLOAT16
            )
        request.prompt_token_ids = self._top_k is not None
        asks: list[_Ask] = []
        others: list[_Ask] = []
        num_samples = num_bytes = 0
        while self._again and num_samples < share and len(asks) < max(1, limits.max_prompts):
            ask = self._again.popleft()
            if not ask.samples or self._columns(ask) != top_k:
                others.append(ask)
                continue
            prompt = ask.work.row.prompts[ask.prompt]
            num_bytes += prompt.ByteSize()
            if asks and num_bytes > MAX_REQUEST_BYTES:
                others.append(ask)
                break
            asks.append(ask)
            request.prompts.append(prompt)
            if ask.samples != (0,):
                request.prompts[-1].sample_indices.extend(ask.samples)
            num_samples += len(ask.samples)
        self._again.extendleft(reversed(others))
        unanswered = {(index, sample) for index, ask in enumerate(asks) for sample in ask.samples}
        call = _Call(member=member, request=request, asks=asks, unanswered=unanswered)
        self._calls.add(call)
        member.num_calls += 1
        for _ in unanswered:
            member.load.give(1)
        call.thread = threading.Thread(target=self._listen, args=(call,), name="batch-call", daemon=True)
        call.thread.start()

    def _columns(self, ask: _Ask) -> int | None:
        wanted = [each for each in (self._top_k, ask.work.row.top_logprobs) if each is not None]
        return max(wanted, default=None)

    def _listen(self, call: _Call) -> None:
        error: StillhouseError | None = None
        # Not in the main thread: a Ctrl-C inside of gRPC leaves a call that nobody can end.
        with self._opening:
            if self._closed.is_set():
                return
            call.stream = call.member.teacher.stub.Generate(call.request)
        try:
            for response in call.stream:
                self._put(call, response)
        except grpc.RpcError as broken:
            error = call.member.teacher.error(broken)
        self._put(call, _End(error))

    def _put(self, call: _Call, said: teacher_pb2.GenerateResponse | _End) -> None:
        while not self._closed.is_set():
            try:
                self._events.put((call, said), timeout=_LISTEN_S)
            except queue.Full:
                continue
            return

    def _next_event(self) -> tuple[_Call, teacher_pb2.GenerateResponse | _End] | None:
        """What was heard next; None once it is time to open calls again."""
        pause_s = self._pool.pause_s()
        if not self._calls:
            time.sleep(pause_s)
            return None
        try:
            return self._events.get(timeout=min(pause_s, _LISTEN_S) if pause_s > 0 else _LISTEN_S)
        except queue.Empty:
            return None

    def _take(self, call: _Call, response: teacher_pb2.GenerateResponse) -> Iterator[Answer]:
        call.member.answered()
        for chunk in response.chunks:
            key = chunk.prompt_index, chunk.sample_index
            if key not in call.unanswered:
                raise StillhouseError(
                    Reason.TENSOR_INVALID,
                    f"the teacher answered sample {key[1]} of prompt {key[0]}, which is not waiting for an answer.",
                )
            completion = call.gathering.add(piece_of(chunk, call.member.teacher.limits, call.request))
            if completion is None:
                continue
            call.unanswered.discard(key)
            call.member.load.answer(1)
            ask = call.asks[key[0]]
            if completion.error is not None and completion.error.retryable:
                yield from self._lost(ask, (key[1],), completion.error)
                self._pool.lost(call.member, completion.error)
            else:
                yield from self._done(ask, key[1], completion)

    def _done(self, ask: _Ask, sample: int, completion: Completion) -> Iterator[Answer]:
        self.tokens += len(completion.token_ids)
        done = ask.work.completions
        done[ask.prompt, sample] = completion
        if len(done) == ask.work.row.num_answers:
            yield Answer(row=ask.work.row, completions=done)

    def _ended(self, call: _Call, error: StillhouseError | None) -> Iterator[Answer]:
        self._calls.discard(call)
        call.member.num_calls -= 1
        for _ in call.unanswered:
            call.member.load.take_back(1)
        if not call.unanswered:
            return
        if error is None:
            error = StillhouseError(
                Reason.TEACHER_UNREACHABLE,
                f"The teacher at {call.member.teacher.target} ended a call before every sample was answered.",
            )
        broke = error.retryable or error.reason in (Reason.INTERNAL, Reason.CANCELLED)
        if not broke:
            raise error
        for index in reversed(range(len(call.asks))):
            left = tuple(sample for sample in call.asks[index].samples if (index, sample) in call.unanswered)
            yield from self._lost(call.asks[index], left, error)
        self._pool.lost(call.member, error)

    def _lost(self, ask: _Ask, samples: tuple[int, ...], error: StillhouseError) -> Iterator[Answer]:
        """Asks for them again, before all others; samples that were lost too often fail."""
        attempts = ask.attempts + (error.reason not in _BUSY)
        if attempts >= MAX_ATTEMPTS:
            for sample in samples:
                yield from self._done(ask, sample, failed(ask.prompt, sample, error))
        elif samples:
            self._again.appendleft(_Ask(work=ask.work, prompt=ask.prompt, samples=samples, attempts=attempts))

    def _close(self) -> None:
        with self._opening:
            self._closed.set()
        for call in self._calls:
            if call.stream is not None:
                call.stream.cancel()
        deadline = time.monotonic() + _CLOSE_S
        for call in self._calls:
            if call.thread is not None:
                call.thread.join(max(0.0, deadline - time.monotonic()))
