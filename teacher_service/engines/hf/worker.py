"""The one thread that owns the reference engine's model: it takes calls, sequences to score and samples to write."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.engine import GeneratedPiece, GenerateItem, ScoreItem

Result = TypeVar("Result")

MAX_ACTIVE_SAMPLES = 16
"""Samples that are written in turn, each with its cache; the others wait."""
MAX_UNREAD_PIECES = 64
"""Pieces of a sample that may wait for their reader before its writing pauses."""


class Answer(Generic[Result]):
    """A result that the worker's thread hands to a task on the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.future: asyncio.Future[Result] = self._loop.create_future()
        self.cancelled = False
        """Set by the task; the worker then leaves out the work."""

    def give(self, result: Result) -> None:
        """Called on the worker's thread."""
        self._call(self._set, result, None)

    def fail(self, error: BaseException) -> None:
        """Called on the worker's thread."""
        self._call(self._set, None, error)

    def _call(self, *outcome: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(*outcome)

    def _set(self, result: Any, error: BaseException | None) -> None:
        if self.future.done():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    async def wait(self) -> Result:
        """The result; cancelling drops the work."""
        try:
            return await self.future
        finally:
            self.cancelled = True


@dataclass(eq=False, kw_only=True, slots=True)
class ScoreJob:
    """A sequence to score."""

    item: ScoreItem
    answer: Answer[Distributions]


@dataclass(eq=False, kw_only=True, slots=True)
class CallJob:
    """Something to do to the model, such as loading an adapter."""

    action: Callable[[], Any]
    answer: Answer[Any]


@dataclass(eq=False, kw_only=True, slots=True)
class SampleJob:
    """A sample to write; `pieces` ends with a finish or an exception."""

    item: GenerateItem
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[GeneratedPiece | BaseException] = field(default_factory=asyncio.Queue)
    unread: int = 0
    cancelled: bool = False
    state: Any = None
    """What the writer keeps between tokens: its cache and its source of chance."""


class Worker:
    """Runs calls first, then in turn a batch of sequences and one token of each active sample."""

    def __init__(
        self,
        *,
        score: Callable[[list[ScoreJob]], None],
        step: Callable[[SampleJob], GeneratedPiece],
        take: Callable[[deque[ScoreJob]], list[ScoreJob]],
        num_threads: int,
    ) -> None:
        self._score = score
        self._step = step
        self._take = take
        self._num_threads = num_threads
        self._changed = threading.Condition()
        self._calls: deque[CallJob] = deque()
        self._sequences: deque[ScoreJob] = deque()
        self._samples: deque[SampleJob] = deque()
        self._active: list[SampleJob] = []
        self._in_hand: list[Answer[Any]] = []
        self._closing = False
        self.death: BaseException | None = None
        """Why the thread can work no more."""
        self._thread = threading.Thread(target=self._run, name="hf-engine", daemon=True)
        self._thread.start()

    async def call(self, action: Callable[[], Result]) -> Result:
        """What `action` gives when the worker's thread runs it."""
        job = CallJob(action=action, answer=Answer())
        self._submit(self._calls, job)
        result: Result = await job.answer.wait()
        return result

    async def score(self, item: ScoreItem) -> Distributions:
        """The answer to one sequence."""
        job = ScoreJob(item=item, answer=Answer())
        self._submit(self._sequences, job)
        return await job.answer.wait()

    def start_sample(self, item: GenerateItem) -> SampleJob:
        """A sample that the worker will write."""
        job = SampleJob(item=item, loop=asyncio.get_running_loop())
        self._submit(self._samples, job)
        return job

    async def next_piece(self, job: SampleJob) -> GeneratedPiece:
        """The next piece of a sample, in order."""
        piece = await job.pieces.get()
        with self._changed:
            job.unread -= 1
            self._changed.notify_all()
        if isinstance(piece, BaseException):
            raise piece
        return piece

    def drop_sample(self, job: SampleJob) -> None:
        """Stops the writing of a sample."""
        with self._changed:
            job.cancelled = True
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the thread after the step that it is in; what waits fails."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _submit(self, queue: deque[Any], job: Any) -> None:
        with self._changed:
            if self.death is not None or self._closing:
                raise engine_dead(self.death)
            queue.append(job)
            self._changed.notify_all()

    def _run(self) -> None:
        # The number of threads belongs to the thread that sets it, and the bits of a result to the number.
        torch.set_num_threads(self._num_threads)
        try:
            while self._wait():
                self._turn()
        except BaseException as error:
            self.death = error
        self._fail_waiting(engine_dead(self.death))

    def _wait(self) -> bool:
        """Sleeps until there is work; False when closing."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._calls or self._sequences or self._writable()
            )
            return not self._closing

    def _writable(self) -> list[SampleJob]:
        self._active = [job for job in self._active if not job.cancelled]
        while self._samples and len(self._active) < MAX_ACTIVE_SAMPLES:
            job = self._samples.popleft()
            if not job.cancelled:
                self._active.append(job)
        return [job for job in self._active if job.unread < MAX_UNREAD_PIECES]

    def _turn(self) -> None:
        with self._changed:
            calls = [self._calls.popleft() for _ in range(len(self._calls))]
            # In place: `_submit` holds on to the queue before it holds the lock.
            live = [job for job in self._sequences if not job.answer.cancelled]
            self._sequences.clear()
            self._sequences.extend(live)
            batch = self._take(self._sequences) if self._sequences else []
            samples = self._writable()
        self._in_hand = [*(call.answer for call in calls), *(job.answer for job in batch)]
        for call in calls:
            self._do(call)
        if batch:
            self._score(batch)
        for job in samples:
            self._write(job)

    def _do(self, call: CallJob) -> None:
        try:
            call.answer.give(call.action())
        except Exception as error:
            call.answer.fail(error)

    def _write(self, job: SampleJob) -> None:
        piece: GeneratedPiece | BaseException
        try:
            piece = self._step(job)
        except Exception as error:
            raise_if_fatal(error)
            piece = as_answer(error)
        with self._changed:
            job.unread += 1
            if isinstance(piece, BaseException) or piece.finish:
                self._active.remove(job)
                job.state = None
        if not job.loop.is_closed():
            job.loop.call_soon_threadsafe(job.pieces.put_nowait, piece)

    def _fail_waiting(self, error: StillhouseError) -> None:
        with self._changed:
            self._closing = True
            answers = [*self._in_hand, *(job.answer for job in self._calls)]
            answers += [job.answer for job in self._sequences]
            samples = (*self._active, *self._samples)
        for answer in answers:
            answer.fail(error)
        for job in samples:
            if not job.loop.is_closed():
                job.loop.call_soon_threadsafe(job.pieces.put_nowait, error)


def as_answer(error: Exception) -> Exception:
    """What a caller gets for an exception of one item."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return StillhouseError(
            Reason.OUT_OF_MEMORY, "The teacher has too little memory for this sequence. Send a shorter one."
        )
    return error


def raise_if_fatal(error: Exception) -> None:
    """Raises again what leaves a device unusable, such as a failed assertion in a kernel."""
    if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
        raise error


def engine_dead(why: BaseException | None) -> StillhouseError:
    """What every request gets from an engine that works no more."""
    return StillhouseError(
        Reason.PROCESS_DIED,
        f"The engine has died ({type(why).__name__})." if why is not None else "The engine is closed.",
    )
