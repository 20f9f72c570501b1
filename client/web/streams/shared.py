"""Streams of a service that many readers share: one call upstream, a window of recent items, a cursor for each reader.

A reader whose cursor has left the window reads the items in between by a call of its own, and comes back; so a slow or
late reader neither loses an item nor costs memory.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from stillhouse.client.web.streams.sse import problem_frame
from stillhouse.protos.errors import Reason, StillhouseError, from_status, to_status

WINDOW_ITEMS = 2000
WINDOW_BYTES = 4 * 2**20
LINGER_S = 5.0
"""Time without readers after which the call upstream ends."""
RETRIES_S = (0.5, 1.0, 2.0, 5.0)
MAX_READERS, MAX_READERS_OF_CLIENT = 1000, 300
CATCHING_UP = 8
"""Readers that may read by calls of their own at a time."""
ITEMS_AT_ONCE = 500
"""Items that one of them reads in its turn."""
HEARTBEAT_S = 15.0
READER_CHECK_S = 60.0
"""Time after which it is checked again whether a reader may read."""


@dataclass(frozen=True, slots=True)
class Item:
    """A piece of a stream, from position `start`, exclusive, to `end`."""

    start: int
    end: int
    payload: Any
    frame: bytes = field(repr=False)
    """For a reader at `start`."""


Items = AsyncGenerator[Item, None]


class SharedStream:
    """One stream of a service, and its recent items."""

    def __init__(self, source: Callable[[int], Items], *, tail: int) -> None:
        """`source` opens the stream behind a position; `tail` is the argument for where it stands in the beginning.

        The first item of it counts as position alone if it is empty (start == end).
        """
        self._source, self._tail = source, tail
        self._window: list[Item] = []
        self._ends: list[int] = []
        self._bytes = 0
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.position: int | None = None
        """End of the newest item; None before the first."""
        self.ended = False
        self.lost: StillhouseError | None = None
        """Error of the last call upstream, while none stands."""
        self.failed: StillhouseError | None = None
        """Error that a new call would not cure."""
        self.readers = 0

    @property
    def window_start(self) -> int:
        """Position from which the window has every item."""
        return self._window[0].start if self._window else self.position or 0

    def start(self) -> None:
        """Opens the call upstream."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Ends the call upstream."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def after(self, cursor: int) -> Item | None:
        """The item of the window that begins at or spans `cursor`; None at the end."""
        index = bisect_right(self._ends, cursor)
        return self._window[index] if index < len(self._window) else None

    async def changed(self, timeout_s: float) -> bool:
        """Waits for the next item, loss or end; False after `timeout_s`."""
        event = self._changed
        try:
            async with asyncio.timeout(timeout_s):
                await event.wait()
        except TimeoutError:
            return False
        return True

    def wake(self) -> None:
        """Wakes all readers."""
        event, self._changed = self._changed, asyncio.Event()
        event.set()

    async def _run(self) -> None:
        failures = 0
        while not self.ended and self.failed is None:
            try:
                behind = self._tail if self.position is None else self.position
                async with aclosing(self._source(behind)) as items:
                    async for item in items:
                        failures, self.lost = 0, None
                        self._append(item)
                self.ended = True
            except StillhouseError as error:
                if not error.retryable or self.position is None:
                    self.failed = error
                else:
                    self.lost = error
            except Exception as error:
                self.failed = from_status(to_status(error))  # a bug, which this logs
            self.wake()
            if self.lost is not None:
                await asyncio.sleep(RETRIES_S[min(failures, len(RETRIES_S) - 1)])
                failures += 1

    def _append(self, item: Item) -> None:
        if item.end > item.start:
            self._window.append(item)
            self._ends.append(item.end)
            self._bytes += len(item.frame)
        self.position = item.end
        if len(self._window) > WINDOW_ITEMS or self._bytes > WINDOW_BYTES:
            self._shorten()
        self.wake()

    def _shorten(self) -> None:
        """Drops old items until the window is three quarters of its limits, so that it is not moved for each."""
        drop = 0
        while drop < len(self._window) and (
            len(self._window) - drop > WINDOW_ITEMS * 3 // 4 or self._bytes > WINDOW_BYTES * 3 // 4
        ):
            self._bytes -= len(self._window[drop].frame)
            drop += 1
        del self._window[:drop]
        del self._ends[:drop]


class SharedStreams:
    """The shared streams of a server, by key."""

    def __init__(self) -> None:
        self._streams: dict[Hashable, SharedStream] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self.catching_up = asyncio.Semaphore(CATCHING_UP)
        self._readers: Counter[str] = Counter()

    @asynccontextmanager
    async def reader(
        self, client: str, key: Hashable, make: Callable[[], SharedStream]
    ) -> AsyncGenerator[SharedStream, None]:
        """The stream of `key`, made and opened for the first reader, and closed a while after the last.

        One that has ended is made anew, since its run may have been resumed.

        Raises StillhouseError(TOO_MANY_CALLS) for one reader too many.
        """
        if self._readers.total() >= MAX_READERS or self._readers[client] >= MAX_READERS_OF_CLIENT:
            raise StillhouseError(
                Reason.TOO_MANY_CALLS,
                f"This server opens {MAX_READERS} streams, and {MAX_READERS_OF_CLIENT} for one client. Close some, and try "
                "again.",
                retry_after_s=10.0,
            )
        stream = self._streams.get(key)
        if stream is None or stream.failed is not None or stream.ended:
            stream = self._streams[key] = make()
            stream.start()
        stream.readers += 1
        self._readers[client] += 1
        try:
            yield stream
        finally:
            stream.readers -= 1
            self._readers[client] -= 1
            self._readers += Counter()  # drops those without any
            if not stream.readers:
                task = asyncio.create_task(self._close_later(key, stream))
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    def wake(self) -> None:
        """Makes every reader look whether it is over."""
        for stream in self._streams.values():
            stream.wake()

    async def close(self) -> None:
        """Ends every call upstream."""
        for task in self._closing:
            task.cancel()
        for stream in self._streams.values():
            await stream.close()

    async def _close_later(self, key: Hashable, stream: SharedStream) -> None:
        await asyncio.sleep(LINGER_S)
        if not stream.readers:
            if self._streams.get(key) is stream:
                del self._streams[key]
            await stream.close()


async def read(
    streams: SharedStreams,
    stream: SharedStream,
    cursor: int,
    *,
    direct: Callable[[int], Items],
    cut: Callable[[Item, int], bytes],
    heartbeat: bytes,
    is_over: Callable[[], bool],
    check: Callable[[], Awaitable[None]],
) -> AsyncGenerator[bytes, None]:
    """Yields the frames behind `cursor` until the stream ends or `is_over`, and `heartbeat` where nothing happens.

    `direct` opens a stream of the reader's own behind a position; `cut` is the frame of the part of an item behind one.
    Raises StillhouseError if the stream has failed, or `check`, which is called now and then, refuses the reader.
    """
    told_lost = False
    checked_s = time.monotonic()
    while not is_over():
        if time.monotonic() - checked_s > READER_CHECK_S:
            await check()
            checked_s = time.monotonic()
        if cursor < stream.window_start:
            missed = await _missed(streams, stream, cursor, direct)
            for each in missed:
                yield each.frame
                cursor = each.end
            if not missed:
                cursor = stream.window_start  # the service has nothing there
            continue
        item = stream.after(cursor)
        if item is not None:
            yield item.frame if item.start == cursor else cut(item, cursor)
            cursor, told_lost = item.end, False
        elif stream.failed is not None:
            raise stream.failed
        elif stream.ended:
            return
        elif stream.lost is not None and not told_lost:
            told_lost = True
            yield problem_frame(stream.lost)
        elif not await stream.changed(HEARTBEAT_S):
            yield heartbeat


async def _missed(
    streams: SharedStreams, stream: SharedStream, cursor: int, direct: Callable[[int], Items]
) -> list[Item]:
    """Items behind `cursor`, up to the window's start or some number, by a call of the reader's own."""
    found: list[Item] = []
    async with streams.catching_up, aclosing(direct(cursor)) as items:
        async for item in items:
            if item.end > item.start:
                found.append(item)
            if item.end >= stream.window_start or len(found) >= ITEMS_AT_ONCE:
                break
    return found
