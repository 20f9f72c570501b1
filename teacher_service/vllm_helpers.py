"""Threads that work on rows while vLLM's worker computes something else, on cores that vLLM leaves free on a CPU.

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
_AHEAD = 4
"""Pieces of work for each thread that wait, before who gives them takes some: each holds its logits."""

Work = Callable[[], None]


class Shared:
    """Work that was given to threads and to whoever calls `finish`; it belongs to one thread."""

    def __init__(self, pool: ThreadPoolExecutor | None) -> None:
        self._pool = pool
        self._given: deque[tuple[Future[None], Work]] = deque()

    def give(self, work: Work, *, at_most: int | None = None) -> None:
        """Takes work for later; this thread does some of it where more than `at_most` pieces wait."""
        if self._pool is None:
            work()
            return
        self._given.append((self._pool.submit(_without_gradients, work), work))
        while self._given and self._given[0][0].done():
            self._finish_one()
        if at_most is not None and len(self._given) > at_most:
            self._given.rotate(1)
            self._finish_one()

    def finish(self) -> None:
        """Returns once all of it is done, by the threads and this one. Raises what any of it raised."""
        while self._given:
            self._given.rotate(1)  # the threads begin with the oldest, this one with the latest
            self._finish_one()

    def _finish_one(self) -> None:
        future, work = self._given.popleft()
        if future.cancel():
            _without_gradients(work)
        else:
            future.result()


class Helpers:
    """None or a few threads."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count, "stillhouse-rows") if count else None

    @classmethod
    def of_environment(cls) -> Helpers:
        """As many as the service's process has asked for."""
        return cls(int(os.environ.get(HELPERS) or 0))

    def shared(self) -> Shared:
        """A place for work that is finished some time."""
        return Shared(self._pool)

    @contextmanager
    def sharing(self) -> Iterator[Callable[[Work], None]]:
        """Takes work; leaves once all of it is done, by these threads and this one. Raises what any of it raised."""
        shared = self.shared()
        yield lambda work: shared.give(work, at_most=_AHEAD * (self.count + 1))
        shared.finish()

    def piece_rows(self, num_rows: int) -> int:
        """Into pieces of how many rows so many are cut."""
        return min(SHARED_ROWS, max(_LEAST_ROWS, -(-num_rows // (_PIECES * (self.count + 1)))))


def _without_gradients(work: Work) -> None:
    with torch.inference_mode():  # which holds for one thread alone, and not between vLLM's steps
        work()
