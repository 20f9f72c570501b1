"""Memory budget of unread responses: bounded for the service, and for each call by a fraction of what is left."""

from __future__ import annotations

import asyncio

from stillhouse.teacher_service.engine import DistributionOptions

MAX_UNREAD_BYTES = 1 << 30
"""Limit of the service, over all calls."""
LEAST_BYTES = 1 << 20
"""Smallest limit of a call, however many others there are."""
_FRACTION = 8


def response_bytes(
    num_rows: int, options: DistributionOptions, *, num_queries: int = 0, hidden_size: int = 0
) -> int:
    """Estimates the bytes of a response before it is computed."""
    sampled = options.num_sampled_tokens * (1 + options.sampled_logprobs)
    hidden = hidden_size * (options.hidden_states + len(options.hidden_layers))
    columns = 2 * options.top_k + 3 + len(options.temperatures) + sampled + num_queries + hidden
    return 4 * num_rows * columns


class ResponseBudget:
    """Bytes of unread responses over all calls."""

    def __init__(self, max_bytes: int = MAX_UNREAD_BYTES) -> None:
        self._max_bytes = max_bytes
        self.num_bytes = 0
        """Bytes in use."""

    @property
    def call_limit_bytes(self) -> int:
        """An eighth of what is left, so that slow readers share it and other calls find room."""
        return max(LEAST_BYTES, (self._max_bytes - self.num_bytes) // _FRACTION)


class CallBudget:
    """Bytes of one call's unread responses: of Score from the request to the engine on, of Generate as samples grow,
    until sent."""

    def __init__(self, memory: ResponseBudget) -> None:
        self._memory = memory
        self._num_bytes = 0
        self._freed = asyncio.Event()

    async def reserve(self, num_bytes: int) -> None:
        """Reserves memory for a response, once the call has room; a single response always has."""
        while self._num_bytes and self._num_bytes + num_bytes > self._memory.call_limit_bytes:
            self._freed.clear()
            await self._freed.wait()
        self.charge(num_bytes)

    @property
    def has_room(self) -> bool:
        """True while the call is within its limit."""
        return self._num_bytes <= self._memory.call_limit_bytes

    async def wait_for_room(self) -> None:
        """Waits until the call is within its limit, for responses of unknown size."""
        while not self.has_room:
            self._freed.clear()
            await self._freed.wait()

    def release(self, num_bytes: int) -> None:
        """Releases the memory of a response."""
        self.charge(-num_bytes)
        self._freed.set()

    def release_all(self) -> None:
        """Releases everything at the end of the call."""
        self.release(self._num_bytes)

    def charge(self, num_bytes: int) -> None:
        """Charges a response that already exists."""
        self._num_bytes += num_bytes
        self._memory.num_bytes += num_bytes
