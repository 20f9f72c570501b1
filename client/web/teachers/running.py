"""Requests to teachers that run at once, bounded for all clients and for one, and ended with their callers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from starlette.requests import Request

from stillhouse.client.web.security.callers import Caller
from stillhouse.client.web.streams.sse import disconnected
from stillhouse.protos.errors import Reason, StillhouseError

MAX_CALLS, MAX_CALLS_OF_ONE = 512, 256
"""Requests that run or wait at once, of all clients and of one."""
_T = TypeVar("_T")


class Running:
    """Counts requests by client."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    @contextmanager
    def one(self, caller: Caller) -> Iterator[None]:
        """Counts a request while it runs. Raises StillhouseError(TOO_MANY_CALLS)."""
        name = caller.name
        if self._counts[name] >= MAX_CALLS_OF_ONE or self._counts.total() >= MAX_CALLS:
            raise StillhouseError(
                Reason.TOO_MANY_CALLS,
                f"{self._counts[name]} requests of this client run, of {self._counts.total()} in all; at most "
                f"{MAX_CALLS_OF_ONE} and {MAX_CALLS} do. Wait for some, or send several prompts in one.",
                retry_after_s=1.0,
            )
        self._counts[name] += 1
        try:
            yield
        finally:
            self._counts[name] -= 1
            if not self._counts[name]:
                del self._counts[name]


async def unless_gone(request: Request, work: Awaitable[_T]) -> _T:
    """Does `work`, which ends with its caller. Raises StillhouseError(CANCELLED) if the caller hangs up."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(disconnected(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise StillhouseError(Reason.CANCELLED, "The caller hung up.")
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.wait({task, gone})
