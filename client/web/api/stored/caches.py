"""Caches that runs name, and the contents of those that a run built, as JSON."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.core.json_output import enum_name
from stillhouse.client.trainer.cache_list import SUMMARY, NamedCache, caches_of
from stillhouse.client.trainer.run_lookup import run_id
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import check_names
from stillhouse.client.web.api.stored.artifact import read_json_artifact
from stillhouse.client.web.problems import JsonResponse
from stillhouse.client.web.security.callers import Caller
from stillhouse.protos.stillhouse.v1.run_pb2 import ListRunsRequest, Run

PAGE_RUNS = 500
MOST_RUNS = 2500
"""Runs that are searched for caches, the newest."""
MAX_SUMMARY_BYTES = 4 * 2**20


async def list_caches(context: WebContext, request: Request) -> Response:
    """The caches that the newest runs name, most recently used first."""
    check_names(request.query_params, ())
    found, searched = await find_caches(context, context.callers.of(request))
    return JsonResponse({"caches": [_document(each) for each in found], "searched_runs": searched})


async def get_cache(context: WebContext, request: Request) -> Response:
    """The contents of the cache that a run built."""
    check_names(request.query_params, ())
    contents = await contents_of(context, context.callers.of(request), request.path_params["run"])
    return JsonResponse(contents)


async def find_caches(context: WebContext, caller: Caller) -> tuple[list[NamedCache], int]:
    """The caches of the newest MOST_RUNS runs, and the number of runs. Raises StillhouseError."""
    runs: list[Run] = []
    token = ""
    while True:
        message = ListRunsRequest(page_size=PAGE_RUNS, page_token=token)
        page = await caller.call(context.upstream.trainer, "ListRuns", message)
        # The others are not kept: specs may be large.
        runs += [each if each.spec.cache.path else Run() for each in page.runs]
        token = page.next_page_token
        if not token or len(runs) >= MOST_RUNS:
            return caches_of(runs), len(runs)


async def contents_of(context: WebContext, caller: Caller, run: str) -> dict[str, Any]:
    """The summary that the build `run` left. Raises StillhouseError, as `read_json_artifact` does."""
    return await read_json_artifact(context, caller, run, SUMMARY, limit=MAX_SUMMARY_BYTES)


def _document(cache: NamedCache) -> dict[str, Any]:
    named = cache.build or cache.last_run
    return {
        "path": cache.path,
        "last_run": run_id(cache.last_run.name),
        "use": cache.use,
        "state": enum_name(Run.State.DESCRIPTOR, cache.last_run.state),
        "num_runs": cache.num_runs,
        "build": run_id(cache.build.name) if cache.build is not None else None,
        "data": [each.path for each in named.effective_spec.data.train],
        "target_form": named.effective_spec.loss.sparse_target,
    }
