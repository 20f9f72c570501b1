"""POST /runs: a run from JSON, or from a run file in YAML, whose errors have lines."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.core.json_output import as_json
from stillhouse.client.runfile.load import RunFile, read_run
from stillhouse.client.runfile.source_map import invalid as invalid_file
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import (
    boolean,
    check_names,
    content_type,
    fill_from_json,
    invalid,
    read_body,
    read_json,
)
from stillhouse.client.web.api.routes import PREFIX
from stillhouse.client.web.problems import JsonResponse
from stillhouse.client.web.security.callers import Caller
from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1 import run_pb2

MAX_RUN_BYTES = 256 * 1024
"""As large as the run service takes a spec."""
one_at_a_time = asyncio.Semaphore(1)
"""Reading a run file needs the interpreter, which serves everybody."""
YAML_TYPES = ("application/yaml", "application/x-yaml", "text/yaml")


async def create_run(context: WebContext, request: Request) -> Response:
    """Validates a run and queues it; the body is CreateRunRequest as JSON, or a run file as YAML.

    A run file's `request_id` and `validate_only` are parameters of the query.
    """
    caller = context.callers.of(request)
    await caller.admit(context.upstream.trainer)
    if content_type(request) in YAML_TYPES:
        query = request.query_params
        check_names(query, ("request_id", "validate_only"))
        message = run_pb2.CreateRunRequest(
            validate_only=boolean("validate_only", query.get("validate_only", "0"))
        )
        fill_from_json(message, {"request_id": query.get("request_id", "")})
        file = await run_file(await read_body(request, limit=MAX_RUN_BYTES), "run.yaml")
    else:
        check_names(request.query_params, ())
        body = await read_json(request, limit=MAX_RUN_BYTES)
        spec = body.pop("spec", {})
        if not isinstance(spec, dict):
            raise invalid("spec", "it is not a JSON object.")
        message = run_pb2.CreateRunRequest()
        fill_from_json(message, body)
        file = await run_file_of(spec)
    run = await submit(context, caller, file, message)
    if message.validate_only:
        return JsonResponse(as_json(run))
    return JsonResponse(as_json(run), 201, headers={"location": f"{PREFIX}/{run.name}"})


async def run_file_of(spec: dict[str, Any]) -> RunFile:
    """The run whose fields are the JSON values `spec`. Raises StillhouseError(INVALID_SPEC) as `run_file` does."""
    text = json.dumps(spec, ensure_ascii=True)  # JSON is YAML
    return await run_file(text.encode(), "")


async def run_file(content: bytes, source: str) -> RunFile:
    """The run in `content`; no file of this machine is read for it.

    Raises StillhouseError(INVALID_SPEC) if nothing of it can be read; problems of single fields stay in it.
    """
    async with one_at_a_time:
        return await asyncio.to_thread(read_run, content, source, reads_files=False)


async def submit(
    context: WebContext, caller: Caller, file: RunFile, message: run_pb2.CreateRunRequest
) -> run_pb2.Run:
    """Calls CreateRun for `file`. Raises StillhouseError, INVALID_SPEC with all problems of file and service at once."""
    message.spec.CopyFrom(file.spec)
    problems = list(file.problems)
    message.validate_only |= bool(problems)
    try:
        run: run_pb2.Run = await caller.call(context.upstream.trainer, "CreateRun", message)
    except StillhouseError as error:
        if not problems:
            raise file.source_map.located(error) from error
        problems += file.source_map.problems_of(error.violations, file.problems)
    if problems:
        raise invalid_file(problems)
    return run
