"""Run files in YAML: their schema, edits and checks of their text, and the forecast of a run's memory."""

from __future__ import annotations

import asyncio
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import MessageToDict
from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.core.json_output import as_json, violations_as_json
from stillhouse.client.estimate.forecast import forecast
from stillhouse.client.estimate.model_shape import ModelShape
from stillhouse.client.runfile.edit import Value, edited
from stillhouse.client.runfile.load import RunFile, read_run
from stillhouse.client.runfile.schema import schema_text
from stillhouse.client.runfile.set_options import set_options
from stillhouse.client.runfile.source_map import invalid as invalid_file
from stillhouse.client.runfile.values import check_values
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import check_names, invalid, read_json
from stillhouse.client.web.api.run_creation import MAX_RUN_BYTES, one_at_a_time, run_file, submit
from stillhouse.client.web.problems import JsonResponse
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import run_pb2

FILE_NAME = "run.yaml"
MAX_CHANGES = 100
MAX_CHECK_BYTES = 4 * MAX_RUN_BYTES
"""Two texts, their quotes included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """A text, and what is to be done with it."""

    text: str
    changes: Sequence[tuple[str, Value]]
    opened: str | None
    """Text from which the command line is to lead to the changed one."""
    validates: bool
    """True to ask the run service, too."""


async def run_file_schema(_context: WebContext, request: Request) -> Response:
    """The JSON Schema of a run file."""
    check_names(request.query_params, ())
    return JsonResponse(json.loads(schema_text()))


async def check_run_file(context: WebContext, request: Request) -> Response:
    """Makes changes in a run file's text, and tells its problems, values and command line."""
    check_names(request.query_params, ())
    caller = context.callers.of(request)
    await caller.admit(context.upstream.trainer)
    asked = _asked(await read_json(request, limit=MAX_CHECK_BYTES))
    answer: dict[str, Any] = {"text": asked.text, "keeps_comments": True, "problems": []}
    try:
        async with one_at_a_time:
            answer["text"], answer["keeps_comments"] = await asyncio.to_thread(_changed, asked)
        file = await run_file(_bytes(answer["text"]), FILE_NAME)
        answer["written"] = MessageToDict(file.spec, preserving_proto_field_name=True)
        if asked.opened is not None:
            async with one_at_a_time:
                answer["command"] = await asyncio.to_thread(_command, asked.opened, file)
        if asked.validates:
            run = await submit(context, caller, file, run_pb2.CreateRunRequest(validate_only=True))
            answer["effective_spec"] = as_json(run.effective_spec)
        elif file.problems:
            raise invalid_file(file.problems)
    except StillhouseError as error:
        if error.reason != Reason.INVALID_SPEC:
            raise
        answer["problems"] = violations_as_json(error) or [{"field": "", "description": error.message}]
    return JsonResponse(answer)


async def estimate_run_file(context: WebContext, request: Request) -> Response:
    """Forecasts the memory of a run on the trainer's host."""
    check_names(request.query_params, ())
    caller = context.callers.of(request)
    await caller.admit(context.upstream.trainer)
    body = await read_json(request, limit=MAX_CHECK_BYTES)
    for name in body:
        if name != "text":
            raise invalid(name[:80], "there is no such field; valid is: text.")
    file = await run_file(_bytes(_text(body, "text")), FILE_NAME)
    if file.problems:
        raise invalid_file(file.problems)
    check_values(file)
    student = file.spec.student
    message = run_pb2.InspectStudentRequest(model=student.model, revision=student.revision)
    found: run_pb2.InspectStudentResponse = await caller.call(
        context.upstream.trainer, "InspectStudent", message
    )
    shape = ModelShape.parse(found.config_json, student.model)
    resources = file.spec.resources
    on_cpu = not found.gpu_memory_bytes or (
        resources.HasField("gpu_count") and resources.gpu_count == 0 and not resources.gpus
    )
    limit = found.host_memory_bytes if on_cpu else max(found.gpu_memory_bytes)
    return JsonResponse(forecast(file.spec, shape, device="cpu" if on_cpu else "gpu", limit=limit).as_json())


def _asked(body: dict[str, Any]) -> Asked:
    """Raises StillhouseError(INVALID_REQUEST) for a body of another form."""
    for name in body:
        if name not in ("text", "changes", "opened", "validate"):
            raise invalid(name[:80], "there is no such field; valid are: text, changes, opened, validate.")
    changes, validates = body.get("changes", []), body.get("validate", True)
    if not isinstance(changes, list) or len(changes) > MAX_CHANGES:
        raise invalid("changes", f"it must be a list of at most {MAX_CHANGES} changes.")
    if not isinstance(validates, bool):
        raise invalid("validate", "it must be true or false.")
    return Asked(
        text=_text(body, "text"),
        changes=[_change(each, f"changes[{at}]") for at, each in enumerate(changes)],
        opened=_text(body, "opened") if "opened" in body else None,
        validates=validates,
    )


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or len(value) > MAX_RUN_BYTES:
        raise invalid(name, f"it must be text of at most {MAX_RUN_BYTES} characters.")
    return value


def _change(change: Any, where: str) -> tuple[str, Value]:
    if (
        not isinstance(change, dict)
        or set(change) != {"path", "value"}
        or not isinstance(change["path"], str)
    ):
        raise invalid(where, 'it must be {"path": "...", "value": ...}.')
    value = change["value"]
    texts = (
        value if isinstance(value, list) else [*value.values()] if isinstance(value, dict) else [value or ""]
    )
    if not all(isinstance(each, str) for each in texts):
        raise invalid(f"{where}.value", "it must be text, a list or a set of texts, or null.")
    return change["path"], value


def _changed(asked: Asked) -> tuple[str, bool]:
    text, kept = asked.text, True
    for path, value in asked.changes:
        text, keeps = edited(text, path, value)
        kept &= keeps
    return text, kept


def _command(opened: str, file: RunFile) -> str | None:
    """The command that creates the run from the opened text; None if no command does."""
    try:
        before = read_run(_bytes(opened), FILE_NAME, reads_files=False)
    except StillhouseError:
        return None
    options = set_options(before.spec, file.spec) if not (before.problems or file.problems) else None
    if options is None:
        return None
    return " ".join(["stillhouse run create", FILE_NAME, *(f"--set {shlex.quote(each)}" for each in options)])


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # a lone half of a pair is then no UTF-8, at its line
