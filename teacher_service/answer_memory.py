"""Memory for answers that their callers have not read: bounded for the whole service, and for each call by what is left."""

from __future__ import annotations

import asyncio

MAX_UNREAD_BYTES = 1 << 30
"""Of all calls together; what the engine is at work on comes on top."""
LEAST_BYTES = 1 << 20
"""What a call may have unread however many others there are."""
_FRACTION = 8


class AnswerMemory:
    """What all calls hold."""

    def __init__(self, max_bytes: int = MAX_UNREAD_BYTES) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0
        """Unread at present."""

    @property
    def limit_of_a_call(self) -> int:
        """An eighth of what is left, so that callers who do not read share it and others find room."""
        return max(LEAST_BYTES, (self._max_bytes - self.num_bytes) // _FRACTION)


class UnreadAnswers:
    """What one call holds: above its limit nothing more of it is computed until its caller reads."""

    def __init__(self, memory: AnswerMemory) -> None:
        self._memory = memory
        self._num_bytes = 0
        self._read = asyncio.Event()

    async def room(self) -> None:
        """Returns once there is room for another answer."""
        while self._num_bytes > self._memory.limit_of_a_call:
            self._read.clear()
            await self._read.wait()

    def add(self, num_bytes: int) -> None:
        """An answer was computed."""
        self._num_bytes += num_bytes
        self._memory.num_bytes += num_bytes

    def take(self, num_bytes: int) -> None:
        """An answer, or a part, has left for its caller."""
        self.add(-num_bytes)
        self._read.set()

    def clear(self) -> None:
        """The call has ended."""
        self.take(self._num_bytes)
