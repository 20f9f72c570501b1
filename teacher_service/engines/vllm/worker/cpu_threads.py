"""CPU threads of vLLM's worker: the core that vLLM reserves for its front end also computes while prompts are scored.

`with_free_cores` gives PyTorch one more thread in steps that only score; `HelperThreads` turn logits into rows beside them, and
beside the steps that follow.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch

from stillhouse.teacher_service.engines.vllm.worker.request_plan import HELPER_THREADS_VARIABLE, score_start

KEPT_SIZES = 32
"""Step sizes whose matmul kernels vLLM caches, least recently used first out."""
SHARED_ROWS = 512
"""Largest chunk, small enough that there is soon work to share."""
_LEAST_ROWS = 32
_CHUNKS_PER_THREAD = 4
"""Chunks of a step per thread, where it has enough rows, so that all threads end at about the same time."""
CACHED_WEIGHTS = 1 << 24
"""Largest layer that stays in the cache; a larger one is read again for each chunk, at the cost of some fifty rows."""
_LARGE_ROWS = 256
"""Largest chunk for such a layer, whose logits are buffer."""
_AHEAD = 4
"""Waiting chunks per thread, each with its logits, before the sharing thread computes some itself."""

_DEFERRED = 2
"""Results that may be deferred at once, each with the logits of a step that it is computed from."""

Step = Callable[..., Any]
Work = Callable[[], None]
Result = TypeVar("Result")


def with_free_cores(runner: Any, step: Step, helpers: int) -> Step:
    """Wraps the runner's `execute_model`: `helpers` more threads in steps that only score, or of a size not cached.

    Cached kernels keep the number of threads of their first step. Raises AttributeError if this PyTorch has no such switch:
    vLLM's worker disables `torch.set_num_threads`, since elsewhere its threads are bound to cores.
    """
    set_num_threads = torch._C.set_num_threads
    sizes: OrderedDict[int, None] = OrderedDict()

    def is_cached(size: int) -> bool:
        """True if a step of this size ran recently; records it."""
        known = size in sizes
        sizes[size] = None
        sizes.move_to_end(size)
        if len(sizes) > KEPT_SIZES:
            sizes.popitem(last=False)
        return known

    def execute_model(scheduler_output: Any, *arguments: Any, **named: Any) -> Any:
        if is_cached(scheduler_output.total_num_scheduled_tokens) and not only_scores(
            runner, scheduler_output
        ):
            return step(scheduler_output, *arguments, **named)
        before = torch.get_num_threads()
        set_num_threads(before + helpers)
        try:
            return step(scheduler_output, *arguments, **named)
        finally:
            set_num_threads(before)

    return execute_model


def only_scores(runner: Any, scheduler_output: Any) -> bool:
    """True if every sequence of a step is a prompt with a `ScorePlan`."""
    new = {each.req_id: each.sampling_params for each in scheduler_output.scheduled_new_reqs}
    names = scheduler_output.num_scheduled_tokens
    params = (new[name] if name in new else runner.requests[name].sampling_params for name in names)
    return bool(names) and all(
        each is not None and score_start(each.extra_args) is not None for each in params
    )


class Deferred(Generic[Result]):
    """Result computed by a helper when it has time, or by the first thread that needs it."""

    def __init__(self, pool: ThreadPoolExecutor | None, work: Callable[[], Result]) -> None:
        self._work: Callable[[], Result] | None = work
        self._results: list[Result] = []
        self._lock = threading.Lock()
        if pool is not None:
            pool.submit(_without_gradients, self._run)

    def _run(self) -> None:
        with self._lock:
            if not self._results:
                assert self._work is not None
                self._results.append(self._work())
                self._work = None  # with the logits that it holds

    @property
    def is_done(self) -> bool:
        """True once it is computed without an error."""
        return bool(self._results)

    def result(self) -> Result:
        """Waits for the result, or computes it. Raises the work's error."""
        if not self._results:
            _without_gradients(self._run)
        return self._results[0]


class HelperThreads:
    """Pool of helper threads, possibly empty."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "stillhouse-rows") if count else None
        self._deferred: deque[Deferred[Any]] = deque()

    @classmethod
    def from_environment(cls) -> HelperThreads:
        """Starts as many as the service's process set."""
        return cls(int(os.environ.get(HELPER_THREADS_VARIABLE) or 0))

    @contextmanager
    def sharing(self) -> Iterator[Callable[[Work], None]]:
        """Yields a function that takes work; returns once helpers and this thread have done all. Raises the work's errors."""
        submitted: deque[tuple[Future[None], Work]] = deque()

        def finish_one() -> None:
            future, work = submitted.popleft()
            if future.cancel():
                work()
            else:
                future.result()

        def share(work: Work) -> None:
            if self._pool is None:
                work()
                return
            submitted.append((self._pool.submit(_without_gradients, work), work))
            while submitted and submitted[0][0].done():
                finish_one()
            if len(submitted) > _AHEAD * (self.count + 1):
                submitted.rotate(1)
                finish_one()

        yield share
        while submitted:
            submitted.rotate(1)  # helpers begin with the oldest, this thread with the latest
            finish_one()

    def defer(self, work: Callable[[], Result]) -> Deferred[Result]:
        """Gives work to the helpers whose result is needed later; waits for the oldest of more than _DEFERRED."""
        self._deferred.append(deferred := Deferred(self._pool, work))
        if len(self._deferred) > _DEFERRED:
            self._deferred.popleft().result()
        return deferred

    def chunk_rows(self, num_rows: int, num_weights: int) -> int:
        """Chunk size for `num_rows` rows through a layer of `num_weights` weights."""
        threads = self.count + 1
        chunks = (
            _CHUNKS_PER_THREAD if num_weights <= CACHED_WEIGHTS else -(-num_rows // (threads * _LARGE_ROWS))
        )
        return min(SHARED_ROWS, max(_LEAST_ROWS, -(-num_rows // (chunks * threads))))


def _without_gradients(work: Work) -> None:
    with torch.inference_mode():  # a setting of each thread
        work()
