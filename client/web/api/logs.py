"""A run's log: as plain text, or followed as server-sent events from one StreamLogs for all readers
with one token.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import boolean, check_names, integer
from stillhouse.client.web.security.callers import Caller
from stillhouse.client.web.streams.shared import Item, Items, SharedStream, read
from stillhouse.client.web.streams.sse import HEARTBEAT, MEDIA_TYPE, frame, respond
from stillhouse.protos.stillhouse.v1 import run_pb2

TAIL_BYTES = 64 * 1024
"""End of the log that a shared stream begins with."""
LONGEST_LINE_BYTES = 64 * 1024
"""A longer line is sent in parts."""


async def run_logs(context: WebContext, request: Request) -> Response:
    """The log from `start_offset`, negative from its end; with `follow` as server-sent events until the run ends."""
    caller = context.callers.of(request)
    query = request.query_params
    check_names(query, ("attempt", "start_offset", "follow"))
    name = f"runs/{request.path_params['run']}"
    attempt = integer("attempt", query.get("attempt", "0"), least=0)
    resumed = request.headers.get("last-event-id")
    offset = integer("start_offset", resumed or query.get("start_offset", "0"))
    default = "true" if MEDIA_TYPE in request.headers.get("accept", "") else "false"
    if boolean("follow", query.get("follow", default)):
        return await respond(_frames(context, caller, name, attempt, offset, resumed=resumed is not None))
    chunks = _text(context, caller, name, attempt, offset)
    first = await anext(chunks, b"")
    return StreamingResponse(_with_first(first, chunks), media_type="text/plain; charset=utf-8")


async def _frames(
    context: WebContext, caller: Caller, name: str, attempt: int, offset: int, *, resumed: bool
) -> AsyncGenerator[bytes, None]:
    def lines(behind: int) -> Items:
        return _followed(context, caller, name, attempt, behind)

    def lines_so_far(behind: int) -> Items:
        return _lines(context, caller, name, attempt, behind, follow=False)

    run = await caller.call(context.upstream.trainer, "GetRun", run_pb2.GetRunRequest(name=name))
    key = ("logs", name, attempt, caller.credentials)
    async with context.streams.reader(
        caller.name, key, lambda: SharedStream(lines, tail=-TAIL_BYTES)
    ) as stream:
        position = await context.position_of(stream)
        cursor = max(0, position + offset) if offset < 0 else min(offset, position)
        if resumed and await context.nothing_follows(run, stream, cursor):
            return
        yield HEARTBEAT  # the response begins, though nothing may be logged for long
        async for each in read(
            context.streams,
            stream,
            cursor,
            direct=lines_so_far,
            cut=lambda item, behind: _frame(item.payload[behind - item.start :], item.end),
            heartbeat=HEARTBEAT,
            is_over=lambda: context.is_over(caller),
            check=lambda: context.check_reader(caller, name),
        ):
            yield each
        if stream.ended:
            yield frame("end", "{}", str(stream.position))


async def _followed(context: WebContext, caller: Caller, name: str, attempt: int, behind: int) -> Items:
    """Whole lines behind a byte, and those that follow; a log that is still empty has a position at once, too."""
    if behind < 0:
        kept = behind
        async for item in _lines(context, caller, name, attempt, behind, follow=False, cut_line=False):
            kept = item.end
            yield item
        behind = max(0, kept)
        yield Item(behind, behind, b"", b"")
    async for item in _lines(context, caller, name, attempt, behind, follow=True):
        yield item


async def _lines(
    context: WebContext,
    caller: Caller,
    name: str,
    attempt: int,
    behind: int,
    *,
    follow: bool,
    cut_line: bool = True,
) -> Items:
    """Whole lines behind a byte, several to an item, and with `cut_line` the beginning of one at the end.

    The first item is empty, and tells where they begin.
    """
    start: int | None = None
    kept = b""
    request = run_pb2.StreamLogsRequest(name=name, start_offset=behind, follow=follow, attempt=attempt)
    async for chunk in caller.stream(context.upstream.trainer, "StreamLogs", request):
        if start is None:
            start = chunk.next_offset - len(chunk.data)
            yield Item(start, start, b"", b"")
        kept += chunk.data
        length = kept.rfind(b"\n") + 1 or (len(kept) if len(kept) > LONGEST_LINE_BYTES else 0)
        if length:
            yield _item(start, kept[:length])
            start, kept = start + length, kept[length:]
    if kept and start is not None and cut_line:
        yield _item(start, kept)


def _item(start: int, data: bytes) -> Item:
    return Item(start, start + len(data), data, _frame(data, start + len(data)))


def _frame(data: bytes, end: int) -> bytes:
    return frame("log", data.decode("utf-8", "replace").removesuffix("\n"), str(end))


async def _text(
    context: WebContext, caller: Caller, name: str, attempt: int, offset: int
) -> AsyncGenerator[bytes, None]:
    request = run_pb2.StreamLogsRequest(name=name, start_offset=offset, attempt=attempt)
    async for chunk in caller.stream(context.upstream.trainer, "StreamLogs", request):
        yield chunk.data


async def _with_first(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    yield first
    async with aclosing(rest):
        async for each in rest:
            yield each
