"""Handlers of unary rpcs, made from their routes and the descriptors of the contract."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.core.json_output import as_json
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import (
    check_names,
    fill_from_json,
    fill_from_query,
    invalid,
    read_json,
)
from stillhouse.client.web.api.routes import Route
from stillhouse.client.web.problems import JsonResponse
from stillhouse.client.web.upstream import Service

MAX_STRAY_BYTES = 16 * 1024
"""Largest body where none is taken; an empty object passes."""


async def unary(context: WebContext, route: Route, request: Request) -> Response:
    """Makes the call of `route` that the request asks for."""
    caller = context.callers.of(request)
    service = service_of(context, route, request)
    message = GetMessageClass(service.method(route.name).input_type)()
    if route.takes_body:
        await caller.admit(service)
        check_names(request.query_params, ())
        fill_from_json(message, without_path_fields(route, await read_json(request)))
    else:
        fill_from_query(message, request.query_params, hidden=route.fields)
        for name in await read_json(request, limit=MAX_STRAY_BYTES):
            raise invalid(name[:80], "the request takes no body; give its fields in the query.")
    fill_from_path(message, route, request)
    response = await caller.call(service, route.name, message, timeout_s=route.timeout_s)
    if route.status == 204:
        return Response(status_code=204)
    return JsonResponse(as_json(response), route.status)


def service_of(context: WebContext, route: Route, request: Request) -> Service:
    """The service that `route` calls. Raises StillhouseError(NOT_FOUND) for a teacher that is not there."""
    if route.service == "RunService":
        return context.upstream.trainer
    return context.upstream.teacher(request.path_params["teacher"])


def without_path_fields(route: Route, body: dict[str, Any]) -> dict[str, Any]:
    """The body, whose fields must not stand in the path as well."""
    for name in route.fields:
        if name in body:
            raise invalid(name, "it stands in the path; leave it out of the body.")
    return body


def fill_from_path(message: Message, route: Route, request: Request) -> None:
    """Sets the fields that the path gives."""
    values = {name: template.format(**request.path_params) for name, template in route.fields.items()}
    fill_from_json(message, values)
