"""Threads that make rows beside vLLM's worker, on cores that vLLM leaves free on a CPU.

vLLM keeps a core of a CPU for its front end, which has nothing to do while prompts are scored.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch

from teacher_service.vllm_parallel import HELPERS

SHARED_ROWS = 512
"""Rows of logits at a time, so that there is soon something to share."""
_LEAST_ROWS = 32
_PIECES = 4
"""Of a step's work for each thread, where it has so many rows, so that all end at about the same time."""
_CACHED_WEIGHTS = 1 << 24
"""A layer with more comes from memory for each piece anew, which costs as much as computing some fifty rows."""
_LARGE_ROWS = 256
"""Of a piece of such a layer, at most: its logits are held."""
_AHEAD = 4
"""Pieces of work for each thread that wait, before who gives them takes some: each holds its logits."""

Work = Callable[[], None]


class Helpers:
    """None or a few threads."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "stillhouse-rows") if count else None

    @classmethod
    def of_environment(cls) -> Helpers:
        """As many as the service's process has asked for."""
        return cls(int(os.environ.get(HELPERS) or 0))

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

    def piece_rows(self, num_rows: int, num_weights: int) -> int:
        """Into pieces of how many rows so many are cut, each of which reads a layer of so many weights."""
        threads = self.count + 1
        pieces = _PIECES if num_weights <= _CACHED_WEIGHTS else -(-num_rows // (threads * _LARGE_ROWS))
        return min(SHARED_ROWS, max(_LEAST_ROWS, -(-num_rows // (pieces * threads))))


def _without_gradients(work: Work) -> None:
    with torch.inference_mode():  # which holds for one thread alone
        work()
