"""Memory for answers that their callers have not read: bounded for the whole service, and for each call by what is left."""

from __future__ import annotations

import asyncio

from stillhouse.teacher_service.engine import DistributionOptions

MAX_UNREAD_BYTES = 1 << 30
"""Of all calls together."""
LEAST_BYTES = 1 << 20
"""What a call may have unread however many others there are."""
_FRACTION = 8


def answer_bytes(num_rows: int, options: DistributionOptions, *, num_queries: int = 0) -> int:
    """About what an answer takes, before it is computed; hidden states, whose width the request does not say, apart."""
    columns = 2 * options.top_k + 3 + len(options.temperatures) + options.num_sampled_tokens + num_queries
    return 4 * num_rows * columns


class AnswerMemory:
    """What all calls hold."""

    def __init__(self, max_bytes: int = MAX_UNREAD_BYTES) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0
        """Held at present."""

    @property
    def limit_of_a_call(self) -> int:
        """An eighth of what is left, so that callers who do not read share it and others find room."""
        return max(LEAST_BYTES, (self._max_bytes - self.num_bytes) // _FRACTION)


class UnreadAnswers:
    """What one call holds: answers to Score from when they are asked of the engine, samples as they grow, until they have
    left for their caller."""

    def __init__(self, memory: AnswerMemory) -> None:
        self._memory = memory
        self._num_bytes = 0
        self._freed = asyncio.Event()

    async def hold(self, num_bytes: int) -> None:
        """Takes memory for an answer, once the call has room for it; one answer alone always has."""
        while self._num_bytes and self._num_bytes + num_bytes > self._memory.limit_of_a_call:
            self._freed.clear()
            await self._freed.wait()
        self.add(num_bytes)

    @property
    def has_room(self) -> bool:
        """Whether the call holds no more than its limit."""
        return self._num_bytes <= self._memory.limit_of_a_call

    async def room(self) -> None:
        """Returns once the call holds no more than its limit, for answers whose size nobody knows beforehand."""
        while not self.has_room:
            self._freed.clear()
            await self._freed.wait()

    def free(self, num_bytes: int) -> None:
        """Gives the memory of an answer back."""
        self.add(-num_bytes)
        self._freed.set()

    def clear(self) -> None:
        """Gives everything back: the call has ended."""
        self.free(self._num_bytes)

    def add(self, num_bytes: int) -> None:
        """Takes memory for an answer that is there already."""
        self._num_bytes += num_bytes
        self._memory.num_bytes += num_bytes
