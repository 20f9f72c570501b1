"""Threads that make rows beside vLLM's worker, on cores that vLLM leaves free on a CPU.

vLLM keeps a core of a CPU for its front end, which has nothing to do while prompts are scored.
"""

from __future__ import annotations

import os
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from stillhouse.teacher_service.engines.vllm.worker.request_plan import HELPER_THREADS_VARIABLE, score_start

SHARED_ROWS = 512
"""Rows of logits at a time, so that there is soon something to share."""
_LEAST_ROWS = 32
_CHUNKS = 4
"""Of a step's work for each thread, where it has so many rows, so that all end at about the same time."""
_CACHED_WEIGHTS = 1 << 24
"""A layer with more comes from memory for each chunk anew, which costs as much as computing some fifty rows."""
_LARGE_ROWS = 256
"""Of a chunk of such a layer, at most: its logits are held."""
_AHEAD = 4
"""Chunks of work for each thread that wait, before who gives them takes some: each holds its logits."""

Work = Callable[[], None]


class HelperThreads:
    """None or a few threads."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "stillhouse-rows") if count else None

    @classmethod
    def from_environment(cls) -> HelperThreads:
        """As many as the service's process has asked for."""
        return cls(int(os.environ.get(HELPER_THREADS_VARIABLE) or 0))

    @contextmanager
    def sharing(self) -> Iterator[Callable[[Work], None]]:
        """Takes work; leaves once all of it is done, by these threads and this one. Raises what any of it raised."""
        given: deque[tuple[Future[None], Work]] = deque()

        def finish_one() -> None:
            future, work = given.popleft()
            if future.cancel():
                work()
            else:
                future.result()

        def share(work: Work) -> None:
            if self._pool is None:
                work()
                return
            given.append((self._pool.submit(_without_gradients, work), work))
            while given and given[0][0].done():
                finish_one()
            if len(given) > _AHEAD * (self.count + 1):
                given.rotate(1)
                finish_one()

        yield share
        while given:
            given.rotate(1)  # the threads begin with the oldest, this one with the latest
            finish_one()

    def chunk_rows(self, num_rows: int, num_weights: int) -> int:
        """Into chunks of how many rows so many are cut, each of which reads a layer of so many weights."""
        threads = self.count + 1
        chunks = _CHUNKS if num_weights <= _CACHED_WEIGHTS else -(-num_rows // (threads * _LARGE_ROWS))
        return min(SHARED_ROWS, max(_LEAST_ROWS, -(-num_rows // (chunks * threads))))


def _without_gradients(work: Work) -> None:
    with torch.inference_mode():  # which holds for one thread alone
        work()


Step = Callable[..., Any]
KEPT_SIZES = 32
"""Numbers of rows for which vLLM keeps its products; those that were not used for longest go first."""


def only_scores(runner: Any, scheduler_output: Any) -> bool:
    """Whether every sequence of a step is a prompt whose rows Stillhouse asked for."""
    new = {each.req_id: each.sampling_params for each in scheduler_output.scheduled_new_reqs}
    names = scheduler_output.num_scheduled_tokens
    params = (new[name] if name in new else runner.requests[name].sampling_params for name in names)
    return bool(names) and all(
        each is not None and score_start(each.extra_args) is not None for each in params
    )


def with_free_cores(runner: Any, step: Step, helpers: int) -> Step:
    """The runner's `execute_model`, with `helpers` more threads where it only scores, and at a size that is not kept.

    Raises AttributeError if this PyTorch has no such switch. vLLM's worker has taken `torch.set_num_threads` away, for its
    threads are bound to cores elsewhere; here they are not.
    """
    set_num_threads = torch._C.set_num_threads
    sizes: OrderedDict[int, None] = OrderedDict()

    def is_kept(size: int) -> bool:
        """Whether products of so many rows were computed lately; from now on they were."""
        known = size in sizes
        sizes[size] = None
        sizes.move_to_end(size)
        if len(sizes) > KEPT_SIZES:
            sizes.popitem(last=False)
        return known

    def execute_model(scheduler_output: Any, *arguments: Any, **named: Any) -> Any:
        if is_kept(scheduler_output.total_num_scheduled_tokens) and not only_scores(runner, scheduler_output):
            return step(scheduler_output, *arguments, **named)
        before = torch.get_num_threads()
        set_num_threads(before + helpers)
        try:
            return step(scheduler_output, *arguments, **named)
        finally:
            set_num_threads(before)

    return execute_model
