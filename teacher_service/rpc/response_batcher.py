"""Batches response parts into messages: flushes at FLUSH_BYTES or after LINGER_S."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import Generic, TypeVar

from stillhouse.protos.rpc.channel import FLUSH_BYTES, MAX_MESSAGE_BYTES

Part = TypeVar("Part")

LINGER_S = 0.004
"""Longest wait of a first part for others."""
PART_BYTES = MAX_MESSAGE_BYTES - FLUSH_BYTES - 4096
"""Largest part: with one more of it, a full message stays within MAX_MESSAGE_BYTES."""


class ResponseBatcher(Generic[Part]):
    """Queue between the tasks of a call and the single generators of its responses.

    Bounded by `response_budget`, not here: a task that waited for a slow reader would hold its slot of the engine.
    """

    def __init__(self) -> None:
        self._parts: deque[tuple[Part, int]] = deque()
        self._num_bytes = 0
        self._has_part = asyncio.Event()
        """Set when there is a part, or at the end."""
        self._is_full = asyncio.Event()
        """Set when a message is full, or at the end."""
        self._ended = False
        self._error: BaseException | None = None

    def put(self, part: Part, num_bytes: int) -> None:
        """Adds a part of at most PART_BYTES."""
        self._parts.append((part, num_bytes))
        self._num_bytes += num_bytes
        self._update_events()

    def end(self, error: BaseException | None = None) -> None:
        """Ends the queue; with an error, the call fails after the parts put before."""
        self._ended, self._error = True, error
        self._update_events()

    async def batches(self) -> AsyncGenerator[list[Part], None]:
        """Yields lists of parts, one per message."""
        while True:
            await self._has_part.wait()
            if not self._parts:
                break
            if not self._is_full.is_set():
                try:
                    async with asyncio.timeout(LINGER_S):
                        await self._is_full.wait()
                except TimeoutError:
                    pass
            yield self._next_batch()
        if self._error is not None:
            raise self._error

    def _next_batch(self) -> list[Part]:
        taken: list[Part] = []
        num_bytes = 0
        while self._parts and num_bytes < FLUSH_BYTES:
            part, size = self._parts.popleft()
            taken.append(part)
            num_bytes += size
        self._num_bytes -= num_bytes
        self._has_part.clear()
        self._is_full.clear()
        self._update_events()
        return taken

    def _update_events(self) -> None:
        if self._parts or self._ended:
            self._has_part.set()
        if self._num_bytes >= FLUSH_BYTES or self._ended:
            self._is_full.set()


async def cancel_all(tasks: set[asyncio.Task[None]]) -> None:
    """Cancels tasks and waits until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
