"""Worker thread that owns the reference engine's model: it runs calls, scores sequences and generates samples."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.library_errors import memory_cause
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.engine import GeneratedChunk, GenerateInput, ScoreInput

Result = TypeVar("Result")

MAX_ACTIVE_SAMPLES = 16
"""Samples that take turns, each with its cache; the others wait."""
MAX_UNREAD_CHUNKS = 64
"""Unread chunks of a sample at which its generation pauses."""


@dataclass(eq=False, kw_only=True, slots=True)
class ScoreJob:
    """A sequence to score."""

    item: ScoreInput
    future: Future[Distributions] = field(default_factory=Future)


@dataclass(eq=False, kw_only=True, slots=True)
class CallJob:
    """An action on the model, such as loading an adapter."""

    action: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)


@dataclass(eq=False, kw_only=True, slots=True)
class SampleJob:
    """A sample to generate; `chunks` ends with a finish or an exception."""

    item: GenerateInput
    loop: asyncio.AbstractEventLoop
    chunks: asyncio.Queue[GeneratedChunk | BaseException] = field(default_factory=asyncio.Queue)
    unread: int = 0
    cancelled: bool = False
    state: Any = None
    """Generation state between tokens: KV cache and random generator."""

    def send(self, chunk: GeneratedChunk | BaseException) -> None:
        """Called on the worker's thread."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.chunks.put_nowait, chunk)


class Worker:
    """Alternates between calls, a batch of sequences, and one token of each active sample."""

    def __init__(
        self,
        *,
        score: Callable[[list[ScoreJob]], None],
        step: Callable[[SampleJob], GeneratedChunk],
        select_batch: Callable[[deque[ScoreJob]], list[ScoreJob]],
        num_threads: int,
    ) -> None:
        self._score = score
        self._step = step
        self._select_batch = select_batch
        self._num_threads = num_threads
        self._changed = threading.Condition()
        self._calls: deque[CallJob] = deque()
        self._sequences: deque[ScoreJob] = deque()
        self._samples: deque[SampleJob] = deque()
        self._active: list[SampleJob] = []
        self._in_progress: list[ScoreJob | CallJob] = []
        self._closing = False
        self.death: BaseException | None = None
        """Exception that ended the thread."""
        self._thread = threading.Thread(target=self._run, name="hf-engine", daemon=True)
        self._thread.start()

    async def call(self, action: Callable[[], Result]) -> Result:
        """Runs `action` on the worker's thread; returns its result. Cancelling drops an action not begun."""
        job = CallJob(action=action)
        self._submit(self._calls, job)
        result: Result = await asyncio.wrap_future(job.future)
        return result

    async def score(self, item: ScoreInput) -> Distributions:
        """Computes the distributions of one sequence. Cancelling drops a sequence not begun."""
        job = ScoreJob(item=item)
        self._submit(self._sequences, job)
        return await asyncio.wrap_future(job.future)

    def start_sample(self, item: GenerateInput) -> SampleJob:
        """Queues a sample for generation."""
        job = SampleJob(item=item, loop=asyncio.get_running_loop())
        self._submit(self._samples, job)
        return job

    async def next_chunk(self, job: SampleJob) -> GeneratedChunk:
        """Waits for the next chunk of a sample, in order."""
        chunk = await job.chunks.get()
        with self._changed:
            job.unread -= 1
            self._changed.notify_all()
        if isinstance(chunk, BaseException):
            raise chunk
        return chunk

    def drop_sample(self, job: SampleJob) -> None:
        """Stops the generation of a sample."""
        with self._changed:
            job.cancelled = True
            self._changed.notify_all()

    def close(self) -> None:
        """Ends the thread after its current step; waiting work fails."""
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
        # The setting is per thread, and results depend on it bitwise.
        torch.set_num_threads(self._num_threads)
        try:
            while self._wait():
                self._run_once()
        except BaseException as error:
            self.death = error
        self._fail_waiting(engine_dead(self.death))

    def _wait(self) -> bool:
        """Sleeps until there is work; False when closing."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._calls or self._sequences or self._runnable_samples()
            )
            return not self._closing

    def _runnable_samples(self) -> list[SampleJob]:
        self._active = [job for job in self._active if not job.cancelled]
        while self._samples and len(self._active) < MAX_ACTIVE_SAMPLES:
            job = self._samples.popleft()
            if not job.cancelled:
                self._active.append(job)
        return [job for job in self._active if job.unread < MAX_UNREAD_CHUNKS]

    def _run_once(self) -> None:
        with self._changed:
            calls = [self._calls.popleft() for _ in range(len(self._calls))]
            # In place: `_submit` refers to the queue before it holds the lock.
            live = [job for job in self._sequences if not job.future.cancelled()]
            self._sequences.clear()
            self._sequences.extend(live)
            batch = self._select_batch(self._sequences) if self._sequences else []
            samples = self._runnable_samples()
        # From here on a job is not cancelled.
        calls = [job for job in calls if job.future.set_running_or_notify_cancel()]
        batch = [job for job in batch if job.future.set_running_or_notify_cancel()]
        self._in_progress = [*calls, *batch]
        for call in calls:
            self._run_call(call)
        if batch:
            self._score(batch)
        for job in samples:
            self._generate_token(job)

    def _run_call(self, call: CallJob) -> None:
        try:
            call.future.set_result(call.action())
        except Exception as error:
            call.future.set_exception(error)

    def _generate_token(self, job: SampleJob) -> None:
        chunk: GeneratedChunk | BaseException
        try:
            chunk = self._step(job)
        except Exception as error:
            raise_if_fatal(error)
            chunk = as_input_error(error)
        with self._changed:
            job.unread += 1
            if isinstance(chunk, BaseException) or chunk.finish:
                self._active.remove(job)
                job.state = None
        job.send(chunk)

    def _fail_waiting(self, error: StillhouseError) -> None:
        with self._changed:
            self._closing = True
            waiting: list[ScoreJob | CallJob] = [*self._calls, *self._sequences]
            samples = (*self._active, *self._samples)
        jobs = [*self._in_progress, *(job for job in waiting if job.future.set_running_or_notify_cancel())]
        for job in jobs:
            if not job.future.done():
                job.future.set_exception(error)
        for sample in samples:
            sample.send(error)


def take_equal_lengths(waiting: deque[ScoreJob], max_tokens: int) -> list[ScoreJob]:
    """Takes the oldest sequence and others of its length and adapter, up to `max_tokens` together; 0 takes one alone."""
    first = waiting.popleft()
    batch = [first]
    if not max_tokens:
        return batch
    length, adapter = len(first.item.token_ids), first.item.adapter
    for job in list(waiting):
        if (len(batch) + 1) * length > max_tokens:
            break
        if len(job.item.token_ids) == length and job.item.adapter == adapter:
            waiting.remove(job)
            batch.append(job)
    return batch


def as_input_error(error: Exception) -> Exception:
    """Maps out-of-memory errors of one input to a StillhouseError."""
    if memory_cause(error) is not None:
        return StillhouseError(
            Reason.OUT_OF_MEMORY, "The teacher has too little memory for this sequence. Send a shorter one."
        )
    return error


def raise_if_fatal(error: Exception) -> None:
    """Re-raises errors that leave a device unusable, such as a failed assertion in a kernel."""
    if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
        raise error


def engine_dead(why: BaseException | None) -> StillhouseError:
    """Builds the error of all requests to a dead or closed engine."""
    return StillhouseError(
        Reason.PROCESS_DIED,
        f"The engine has died ({type(why).__name__})." if why is not None else "The engine is closed.",
    )
