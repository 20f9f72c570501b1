"""Events of a run as server-sent events, from one WatchRun for all readers of the run with one token."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.core.json_output import as_json
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import check_names, integer
from stillhouse.client.web.security.callers import Caller
from stillhouse.client.web.streams.shared import Item, Items, SharedStream, read
from stillhouse.client.web.streams.sse import HEARTBEAT, json_frame, respond
from stillhouse.protos.stillhouse.v1 import run_pb2


async def run_events(context: WebContext, request: Request) -> Response:
    """The run as it is, or all that came after Last-Event-ID; then every change, until the run has ended."""
    caller = context.callers.of(request)
    name = f"runs/{request.path_params['run']}"
    check_names(request.query_params, ("after_sequence",))
    given = request.headers.get("last-event-id") or request.query_params.get("after_sequence") or "0"
    after = integer("after_sequence", given, least=0) or None
    return await respond(_frames(context, caller, name, after))


async def _frames(
    context: WebContext, caller: Caller, name: str, after: int | None
) -> AsyncGenerator[bytes, None]:
    service = context.upstream.trainer

    def events(behind: int) -> Items:
        return _items(context, caller, name, behind)

    run = await caller.call(service, "GetRun", run_pb2.GetRunRequest(name=name))
    key = ("events", name, caller.credentials)
    async with context.streams.reader(caller.name, key, lambda: SharedStream(events, tail=0)) as stream:
        position = await context.position_of(stream)
        if after is None or after > position:
            run = await caller.call(service, "GetRun", run_pb2.GetRunRequest(name=name))
            after = position
            yield json_frame("run", as_json(run), str(position))
        elif await context.nothing_follows(run, stream, after):
            return
        else:
            yield HEARTBEAT  # the response begins, though nothing may happen for long
        async for each in read(
            context.streams,
            stream,
            after,
            direct=events,
            cut=lambda item, _cursor: item.frame,
            heartbeat=HEARTBEAT,
            is_over=lambda: context.is_over(caller),
            check=lambda: context.check_reader(caller, name),
        ):
            yield each
        if stream.ended:
            yield json_frame("end", {}, str(stream.position))


async def _items(context: WebContext, caller: Caller, name: str, behind: int) -> Items:
    """Events behind a sequence; behind 0 the first tells the newest sequence alone."""
    request = run_pb2.WatchRunRequest(name=name, after_sequence=behind)
    last = behind
    async for event in caller.stream(context.upstream.trainer, "WatchRun", request):
        if behind == 0 and last == 0:
            last = event.sequence
            yield Item(last, last, None, b"")
        elif event.sequence > last:
            kind = event.WhichOneof("event") or "run"
            data = json_frame(kind, as_json(getattr(event, kind)), str(event.sequence))
            yield Item(last, event.sequence, None, data)
            last = event.sequence
