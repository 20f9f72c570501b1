"""What a streaming call has to say, gathered into messages: full enough to be cheap, soon enough to be fresh."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import Generic, TypeVar

from stillhouse.protos.rpc.channel import FLUSH_BYTES, MAX_MESSAGE_BYTES

Part = TypeVar("Part")

LINGER_S = 0.004
"""How long a first part waits for company."""
PART_BYTES = MAX_MESSAGE_BYTES - FLUSH_BYTES - 4096
"""Largest part: one more than a full message never exceeds MAX_MESSAGE_BYTES."""


class Outbox(Generic[Part]):
    """A queue between the tasks of a call and the one writer of its responses.

    What bounds it is `answer_memory`: a task that waited here for a slow reader would keep its place in the engine.
    """

    def __init__(self) -> None:
        self._parts: deque[tuple[Part, int]] = deque()
        self._num_bytes = 0
        self._some = asyncio.Event()
        """Something is there, or the end."""
        self._enough = asyncio.Event()
        """A message is full, or nothing follows."""
        self._ended = False
        self._error: BaseException | None = None

    def put(self, part: Part, num_bytes: int) -> None:
        """Adds a part of at most PART_BYTES."""
        self._parts.append((part, num_bytes))
        self._num_bytes += num_bytes
        self._tell()

    def end(self, error: BaseException | None = None) -> None:
        """Says that nothing follows; with an error, that the call fails after what was put before."""
        self._ended, self._error = True, error
        self._tell()

    async def gathered(self) -> AsyncGenerator[list[Part], None]:
        """Lists of parts, each for one message: sent at FLUSH_BYTES, or LINGER_S after the first of them."""
        while True:
            await self._some.wait()
            if not self._parts:
                break
            if not self._enough.is_set():
                try:
                    async with asyncio.timeout(LINGER_S):
                        await self._enough.wait()
                except TimeoutError:
                    pass
            yield self._take()
        if self._error is not None:
            raise self._error

    def _take(self) -> list[Part]:
        taken: list[Part] = []
        num_bytes = 0
        while self._parts and num_bytes < FLUSH_BYTES:
            part, size = self._parts.popleft()
            taken.append(part)
            num_bytes += size
        self._num_bytes -= num_bytes
        self._some.clear()
        self._enough.clear()
        self._tell()
        return taken

    def _tell(self) -> None:
        if self._parts or self._ended:
            self._some.set()
        if self._num_bytes >= FLUSH_BYTES or self._ended:
            self._enough.set()


async def cancel_all(tasks: set[asyncio.Task[None]]) -> None:
    """Cancels tasks and waits until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
