"""Task paths of a co-training platform, for programs that call it: a task is a run, and every body {code, data, message}."""

from __future__ import annotations

import json
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.core.json_output import as_json
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import check_names, invalid, read_json
from stillhouse.client.web.api.run_creation import MAX_RUN_BYTES, run_file_of, submit
from stillhouse.client.web.problems import JsonResponse, error_headers, http_status
from stillhouse.client.web.security.callers import Caller
from stillhouse.protos.errors import Reason, StillhouseError, from_status, to_status
from stillhouse.protos.stillhouse.v1 import run_pb2
from stillhouse.protos.stillhouse.v1.run_pb2 import Run

TASKS = "/model-distillation/tasks"
REPORTS = ("currentEpoch", "accuracy", "loss")
REPORT_FILE = "task_progress.json"
_METRICS = ("train/loss", "eval/accuracy", "eval/agreement")
_STATUS = {
    Run.STATE_PENDING: "PENDING",
    Run.STATE_STARTING: "RUNNING",
    Run.STATE_RUNNING: "RUNNING",
    Run.STATE_STOPPING: "RUNNING",
    Run.STATE_STOPPED: "STOPPED",
    Run.STATE_COMPLETED: "COMPLETED",
    Run.STATE_FAILED: "FAILED",
}


def add_task_routes(app: FastAPI, context: WebContext) -> None:
    """Adds the five paths."""
    for method, path, handle in (
        ("POST", TASKS, create_task),
        ("POST", TASKS + "/{task}/start", start_task),
        ("GET", TASKS + "/{task}", get_task),
        ("PUT", TASKS + "/{task}/progress", report_progress),
        ("POST", TASKS + "/{task}/complete", complete_task),
    ):
        endpoint = _enveloped(partial(handle, context))
        app.add_api_route(path, endpoint, methods=[method], response_model=None, include_in_schema=False)


async def create_task(context: WebContext, request: Request) -> dict[str, Any]:
    """Queues a run from the task form, or from the fields of a run file; it starts when its turn comes."""
    check_names(request.query_params, ())
    caller = context.callers.of(request)
    await caller.admit(context.upstream.trainer)
    file = await run_file_of(await read_json(request, limit=MAX_RUN_BYTES))
    run = await submit(context, caller, file, run_pb2.CreateRunRequest())
    return await _task(context, caller, run)


async def start_task(context: WebContext, request: Request) -> dict[str, Any]:
    """Resumes a task that was stopped or failed; one that is queued or runs stays as it is."""
    check_names(request.query_params, ())
    caller, run = await _found(context, request)
    if run.state in (Run.STATE_STOPPED, Run.STATE_FAILED):
        message = run_pb2.ResumeRunRequest(name=run.name)
        run = await caller.call(context.upstream.trainer, "ResumeRun", message)
    return await _task(context, caller, run)


async def get_task(context: WebContext, request: Request) -> dict[str, Any]:
    """The task as it is."""
    check_names(request.query_params, ())
    caller, run = await _found(context, request)
    return await _task(context, caller, run)


async def report_progress(context: WebContext, request: Request) -> dict[str, Any]:
    """Keeps the report of an outside program beside the run, which measures its own progress."""
    query = request.query_params
    check_names(query, REPORTS)
    caller, run = await _found(context, request)
    report = {name: _number(name, query[name]) for name in REPORTS if name in query}
    message = run_pb2.AttachResultRequest(
        name=run.name, file_name=REPORT_FILE, data=json.dumps(report).encode()
    )
    await caller.call(context.upstream.trainer, "AttachResult", message)
    return await _task(context, caller, run)


async def complete_task(context: WebContext, request: Request) -> dict[str, Any]:
    """Confirms that a task is COMPLETED, which a run becomes by its last step alone."""
    check_names(request.query_params, ())
    caller, run = await _found(context, request)
    if run.state != Run.STATE_COMPLETED:
        raise StillhouseError(
            Reason.RUN_STATE,
            f"Task {_id_of(run)} is {_STATUS[run.state]}; it becomes COMPLETED by its last step. To end it before, POST "
            f"/api/v1/{run.name}:stop.",
        )
    return await _task(context, caller, run)


def _enveloped(
    handle: Callable[[Request], Awaitable[dict[str, Any]]],
) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        headers: dict[str, str] = {}
        try:
            body = {"code": 200, "data": await handle(request), "message": "success"}
        except Exception as failure:
            error = failure if isinstance(failure, StillhouseError) else from_status(to_status(failure))
            code = http_status(error.reason)
            body = {"code": code, "data": {"reason": str(error.reason)}, "message": error.message}
            headers = error_headers(error, code)
        return JsonResponse(body, int(str(body["code"])), headers=headers)

    return endpoint


async def _found(context: WebContext, request: Request) -> tuple[Caller, Run]:
    caller = context.callers.of(request)
    message = run_pb2.GetRunRequest(name=f"runs/{request.path_params['task']}")
    return caller, await caller.call(context.upstream.trainer, "GetRun", message)


async def _task(context: WebContext, caller: Caller, run: Run) -> dict[str, Any]:
    """The run in the platform's words; `accuracy` is the agreement with the teacher where nothing else is measured."""
    query = run_pb2.QueryMetricsRequest(name=run.name, keys=_METRICS, max_points=1)
    found = await caller.call(context.upstream.trainer, "QueryMetrics", query)
    latest = {series.key: series.values[-1] for series in found.series if series.values}
    total = run.progress.total_steps
    share = run.progress.step / total if total else 0.0
    plain = as_json(run)
    return {
        "taskId": _id_of(run),
        "taskName": run.spec.display_name,
        "status": _STATUS[run.state],
        "progress": round(100 * share, 2),
        "currentEpoch": round(share * run.effective_spec.optimizer.epochs, 3),
        "accuracy": latest.get("eval/accuracy", latest.get("eval/agreement")),
        "loss": latest.get("train/loss"),
        "createTime": plain.get("create_time"),
        "startTime": plain.get("start_time"),
        "endTime": plain.get("end_time"),
        "errorMessage": run.error.message if run.HasField("error") else None,
    }


def _id_of(run: Run) -> str:
    return run.name.removeprefix("runs/")


def _number(name: str, text: str) -> float:
    try:
        value = float(text[:40])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise invalid(name, f"{text[:40]!r} is not a finite number.")
    return value
