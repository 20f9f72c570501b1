"""Handlers of the pages: each makes the calls of one page as its caller, and renders it."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from stillhouse.client.trainer.advice import next_step
from stillhouse.client.web.api.artifacts import LIST_TIMEOUT_S
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import check_names
from stillhouse.client.web.pages.comparison import check_runs, final_metrics
from stillhouse.client.web.pages.failure import failure_of_run
from stillhouse.client.web.pages.rendering import render
from stillhouse.client.web.pages.run_list import STATES, filter_of
from stillhouse.client.web.pages.run_summary import RunSummary
from stillhouse.client.web.pages.settings_table import differences, settings_of
from stillhouse.client.web.pages.timeline import timeline_of
from stillhouse.client.web.problems import not_found
from stillhouse.client.web.security.callers import Caller
from stillhouse.client.web.static import files
from stillhouse.protos.stillhouse.v1 import run_pb2

FINAL_POINTS = 4
"""The fewest points of a series that hold its last one."""


def frame_of(context: WebContext, request: Request) -> dict[str, Any]:
    """Values that the frame of every page shows."""
    session = context.callers.session_of(request)
    return {
        "csrf": session.csrf_token if session is not None else "",
        "signed_in": session is not None,
        "trainer": context.upstream.trainer.target,
    }


async def show_runs(context: WebContext, request: Request) -> Response:
    """The list of runs."""
    wanted = filter_of(request.query_params)
    page = await context.callers.of(request).call(context.upstream.trainer, "ListRuns", wanted.request)
    return render(
        "runs.html",
        **frame_of(context, request),
        filter=wanted,
        states=STATES,
        rows=[RunSummary(run=each) for each in page.runs],
        next_token=page.next_page_token,
    )


async def show_run(context: WebContext, request: Request) -> Response:
    """The page of a run."""
    return await _run_page(context, request, "run.html")


async def show_run_head(context: WebContext, request: Request) -> Response:
    """The part of a run's page that changes with its state."""
    return await _run_page(context, request, "run_update.html")


async def show_artifacts(context: WebContext, request: Request) -> Response:
    """The table of a run's files; its service hashes new ones first."""
    check_names(request.query_params, ())
    caller = context.callers.of(request)
    run = request.path_params["run"]
    message = run_pb2.ListArtifactsRequest(name=f"runs/{run}")
    listed = await caller.call(context.upstream.trainer, "ListArtifacts", message, timeout_s=LIST_TIMEOUT_S)
    return render("artifacts.html", run=run, artifacts=listed.artifacts)


async def compare(context: WebContext, request: Request) -> Response:
    """Several runs side by side."""
    check_names(request.query_params, ("run",))
    ids = check_runs(request.query_params.getlist("run"))
    caller = context.callers.of(request)
    runs = await asyncio.gather(*(get_run(context, caller, each) for each in ids))
    metrics = await asyncio.gather(*(_last_metrics(context, caller, each) for each in ids))
    return render(
        "compare.html",
        **frame_of(context, request),
        rows=[RunSummary(run=each) for each in runs],
        differences=differences([each.effective_spec for each in runs]),
        metrics=final_metrics(metrics),
    )


async def show_sign_in(context: WebContext, request: Request) -> Response:
    """The form that takes a token."""
    check_names(request.query_params, ("next",))
    return render(
        "sign_in.html",
        **frame_of(context, request),
        guarded=context.callers.guarded,
        sign_in_file=context.settings.sign_in_path.name,
    )


async def static_file(_context: WebContext, request: Request) -> Response:
    """A static file."""
    found = files.respond(request.path_params["digest"], request.path_params["name"])
    if found is None:
        raise not_found(request.url.path)
    return found


async def icon(_context: WebContext, _request: Request) -> Response:
    """The icon that browsers ask for unasked."""
    return RedirectResponse(files.url_of("own/icon.svg"), 301)


async def _run_page(context: WebContext, request: Request, template: str) -> Response:
    check_names(request.query_params, ())
    caller = context.callers.of(request)
    run = await get_run(context, caller, request.path_params["run"], with_history=True)
    return render(
        template,
        **frame_of(context, request),
        timeline=timeline_of(run),
        summary=RunSummary(run=run),
        run=run,
        failure=failure_of_run(run),
        step=next_step(run),
        settings=settings_of(run),
    )


async def get_run(
    context: WebContext, caller: Caller, run: str, *, with_history: bool = False
) -> run_pb2.Run:
    """The run of this id. Raises StillhouseError."""
    message = run_pb2.GetRunRequest(name=f"runs/{run}", with_history=with_history)
    response: run_pb2.Run = await caller.call(context.upstream.trainer, "GetRun", message)
    return response


async def _last_metrics(context: WebContext, caller: Caller, run: str) -> run_pb2.QueryMetricsResponse:
    message = run_pb2.QueryMetricsRequest(name=f"runs/{run}", max_points=FINAL_POINTS)
    response: run_pb2.QueryMetricsResponse = await caller.call(
        context.upstream.trainer, "QueryMetrics", message
    )
    return response
