"""Routes of the HTTP API on a FastAPI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.core.errors import explain
from stillhouse.client.core.json_output import as_json
from stillhouse.client.web.api.artifacts import artifact
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.dataset_upload import upload_dataset
from stillhouse.client.web.api.events import run_events
from stillhouse.client.web.api.logs import run_logs
from stillhouse.client.web.api.messages import check_names, content_type, invalid, read_body
from stillhouse.client.web.api.routes import PREFIX, ROUTES
from stillhouse.client.web.api.run_creation import create_run
from stillhouse.client.web.api.run_files import check_run_file, estimate_run_file, run_file_schema
from stillhouse.client.web.api.sessions import check_knows, get_session, sign_in, sign_out
from stillhouse.client.web.api.stored.caches import get_cache, list_caches
from stillhouse.client.web.api.stored.examples import get_examples, list_examples
from stillhouse.client.web.api.unary import unary
from stillhouse.client.web.problems import JsonResponse, not_found, problem_response
from stillhouse.protos.errors import Reason, StillhouseError, from_status, to_status
from stillhouse.protos.stillhouse.v1 import run_pb2

MAX_RESULT_BYTES = 512 * 1024
Handler = Callable[[WebContext, Request], Awaitable[Response]]


async def attach_result(context: WebContext, request: Request) -> Response:
    """Stores the body, a JSON object, with the run."""
    check_names(request.query_params, ())
    caller = context.callers.of(request)
    await caller.admit(context.upstream.trainer)
    if content_type(request) != "application/json":
        raise invalid("", "the content type must be application/json.")
    message = run_pb2.AttachResultRequest(
        name=f"runs/{request.path_params['run']}",
        file_name=request.path_params["file_name"],
        data=await read_body(request, limit=MAX_RESULT_BYTES),
    )
    return JsonResponse(as_json(await caller.call(context.upstream.trainer, "AttachResult", message)))


async def list_teachers(context: WebContext, request: Request) -> Response:
    """The teachers of this server, number and address, for whoever some service knows."""
    check_names(request.query_params, ())
    caller = context.callers.of(request)
    await check_knows(context, caller)
    teachers = [{"id": str(n), "target": each.target} for n, each in enumerate(context.upstream.teachers, 1)]
    return JsonResponse({"teachers": teachers})


async def show_reason(_context: WebContext, request: Request) -> Response:
    """Meaning and remedy of a reason, which the `type` of a problem names."""
    check_names(request.query_params, ())
    name = request.path_params["reason"]
    if name not in Reason.__members__:
        raise not_found(request.url.path)
    meaning, remedy = explain(Reason(name))
    return JsonResponse({"reason": name, "meaning": meaning, "remedy": remedy})


async def healthy(_context: WebContext, _request: Request) -> Response:
    """Says that the server runs; the services have health checks of their own."""
    return JsonResponse({"status": "ok"})


SPECIAL: Mapping[str, Handler] = {
    "CreateRun": create_run,
    "WatchRun": run_events,
    "StreamLogs": run_logs,
    "DownloadArtifact": artifact,
    "AttachResult": attach_result,
    "UploadDataset": upload_dataset,
}
"""Handlers of rpcs that stream, or whose body is no message."""
OWN: tuple[tuple[str, str, Handler], ...] = (
    ("GET", f"{PREFIX}/session", get_session),
    ("POST", f"{PREFIX}/session", sign_in),
    ("DELETE", f"{PREFIX}/session", sign_out),
    ("GET", f"{PREFIX}/runs/{{run}}/examples", list_examples),
    ("GET", f"{PREFIX}/runs/{{run}}/examples/{{step}}", get_examples),
    ("GET", f"{PREFIX}/runs/{{run}}/cache", get_cache),
    ("GET", f"{PREFIX}/caches", list_caches),
    ("GET", f"{PREFIX}/teachers", list_teachers),
    ("GET", f"{PREFIX}/errors/{{reason}}", show_reason),
    ("GET", f"{PREFIX}/run-files/schema", run_file_schema),
    ("POST", f"{PREFIX}/run-files:check", check_run_file),
    ("POST", f"{PREFIX}/run-files:estimate", estimate_run_file),
    ("GET", "/healthz", healthy),
)
"""Routes that are no rpc."""


def add_routes(app: FastAPI, context: WebContext) -> None:
    """Adds every route of the API."""
    for method, path, handler in OWN:
        add_route(app, method, path, partial(handler, context))
    for route in ROUTES:
        handler = SPECIAL.get(route.name) or _unary(route.rpc)
        add_route(app, route.method, PREFIX + route.path, partial(handler, context))
        if route.name == "DownloadArtifact":
            add_route(app, "HEAD", PREFIX + route.path, partial(handler, context))


def add_route(app: FastAPI, method: str, path: str, handle: Callable[[Request], Awaitable[Response]]) -> None:
    """Adds a route whose errors are problem documents."""

    async def endpoint(request: Request) -> Response:
        try:
            return await handle(request)
        except StillhouseError as error:
            return problem_response(error)
        except Exception as error:
            return problem_response(from_status(to_status(error)))  # a bug, which this logs

    app.add_api_route(path, endpoint, methods=[method], response_model=None, include_in_schema=False)


def _unary(rpc: str) -> Handler:
    route = next(each for each in ROUTES if each.rpc == rpc)

    async def handle(context: WebContext, request: Request) -> Response:
        return await unary(context, route, request)

    return handle
