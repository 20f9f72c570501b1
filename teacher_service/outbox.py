"""What a streaming call has to say, gathered into messages: full enough to be cheap, soon enough to be fresh."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Generic, TypeVar

from protos.transport import FLUSH_BYTES, MAX_MESSAGE_BYTES

Part = TypeVar("Part")

LINGER_S = 0.004
"""How long a first part waits for company."""
PART_BYTES = MAX_MESSAGE_BYTES - FLUSH_BYTES - 4096
"""Largest part: one more than a full message never exceeds MAX_MESSAGE_BYTES."""
MAX_PARTS = 16
"""Parts that wait for the writer; who has more to say waits."""


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


class Outbox(Generic[Part]):
    """A bounded queue between the tasks of a call and the one writer of its responses."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[Part, int] | _End] = asyncio.Queue(MAX_PARTS)

    async def put(self, part: Part, num_bytes: int) -> None:
        """Adds a part of at most PART_BYTES; waits while the writer is behind."""
        await self._queue.put((part, num_bytes))

    async def end(self, error: BaseException | None = None) -> None:
        """Says that nothing follows; with an error, that the call fails after what was put before."""
        await self._queue.put(_End(error))

    async def gathered(self) -> AsyncGenerator[list[Part], None]:
        """Lists of parts, each for one message: sent at FLUSH_BYTES, or LINGER_S after the first of them."""
        end: _End | None = None
        while end is None:
            first = await self._queue.get()
            if isinstance(first, _End):
                end = first
                break
            parts, num_bytes = [first[0]], first[1]
            deadline = asyncio.get_running_loop().time() + LINGER_S
            while num_bytes < FLUSH_BYTES:
                following = await self._next_before(deadline)
                if following is None or isinstance(following, _End):
                    end = following
                    break
                parts.append(following[0])
                num_bytes += following[1]
            yield parts
        if end.error is not None:
            raise end.error

    async def _next_before(self, deadline: float) -> tuple[Part, int] | _End | None:
        if not self._queue.empty():
            return self._queue.get_nowait()
        try:
            async with asyncio.timeout_at(deadline):
                return await self._queue.get()
        except TimeoutError:
            return None


async def cancel_all(tasks: set[asyncio.Task[None]]) -> None:
    """Cancels tasks and waits until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
