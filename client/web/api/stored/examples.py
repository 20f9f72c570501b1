"""Examples of a run's evaluations as JSON: their index, and the tokens of one evaluation."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import check_names, invalid
from stillhouse.client.web.api.stored.artifact import read_json_artifact, unreadable
from stillhouse.client.web.problems import JsonResponse
from stillhouse.client.web.security.callers import Caller
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.evaluation.examples import FORMAT, INDEX, MAX_BYTES, place_of


async def list_examples(context: WebContext, request: Request) -> Response:
    """The evaluations of a run that have examples, ascending by step; none if it has not been evaluated, or wants none."""
    check_names(request.query_params, ())
    caller, run = context.callers.of(request), request.path_params["run"]
    try:
        document = await _read(context, caller, run, INDEX)
    except StillhouseError as error:
        if error.reason != Reason.ARTIFACT_NOT_FOUND:
            raise
        document = {"format": FORMAT, "evaluations": []}
    return JsonResponse(document)


async def get_examples(context: WebContext, request: Request) -> Response:
    """The examples of the evaluation at one step."""
    check_names(request.query_params, ())
    caller, run = context.callers.of(request), request.path_params["run"]
    step = request.path_params["step"]
    if not (step.isascii() and step.isdecimal() and len(step) < 16):
        raise invalid("step", f"{step[:40]!r} is not a step; the list of examples names them.")
    return JsonResponse(await _read(context, caller, run, place_of(int(step))))


async def _read(context: WebContext, caller: Caller, run: str, path: str) -> dict[str, Any]:
    document = await read_json_artifact(context, caller, run, path, limit=MAX_BYTES)
    if document.get("format") != FORMAT:
        raise unreadable(path, f"is not of format {FORMAT}, which this version reads")
    return document
