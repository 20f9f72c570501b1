"""Page of a new run: the text that it begins with, and what its fields may name."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.core.json_output import set_fields
from stillhouse.client.runfile.yaml_text import document_text, flow_text
from stillhouse.client.trainer.run_lookup import run_id
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import check_names, invalid
from stillhouse.client.web.api.run_creation import MAX_RUN_BYTES
from stillhouse.client.web.pages.rendering import render
from stillhouse.client.web.pages.run_summary import RunSummary
from stillhouse.client.web.pages.views import frame_of
from stillhouse.client.web.security.callers import Caller
from stillhouse.protos.stillhouse.v1 import run_pb2

MOST_DATASETS = 200
MOST_RUNS = 50
"""Runs whose students are suggested."""
LONGEST_NAME = 200
_EMPTY = """\
# Every other setting has a default; the form beside this text describes them all.
student:
  model:
teachers:
  - targets: [{teacher}]
data:
  train:
    - path: {data}
"""


async def show_new_run(context: WebContext, request: Request) -> Response:
    """The form, empty or with the settings of another run."""
    check_names(request.query_params, ("from", "data"))
    caller = context.callers.of(request)
    source = request.query_params.get("from", "")
    run = await _get(context, caller, source) if source else None
    listed = run_pb2.ListDatasetsRequest(page_size=MOST_DATASETS)
    datasets = await caller.call(context.upstream.trainer, "ListDatasets", listed)
    return render(
        "new_run.html",
        **frame_of(context, request),
        text=_first_text(context, request) if run is None else _text_of(run),
        cloned=None if run is None else RunSummary(run=run),
        datasets=datasets.datasets,
        models=await known_models(context, caller),
        max_chars=MAX_RUN_BYTES,
    )


async def known_models(context: WebContext, caller: Caller) -> list[str]:
    """The students of the latest runs, newest first."""
    message = run_pb2.ListRunsRequest(page_size=MOST_RUNS)
    listed = await caller.call(context.upstream.trainer, "ListRuns", message)
    return list(dict.fromkeys(each.spec.student.model for each in listed.runs if each.spec.student.model))


def _first_text(context: WebContext, request: Request) -> str:
    data = request.query_params.get("data", "")
    if len(data) > LONGEST_NAME:
        raise invalid("data", f"it has {len(data)} characters; a dataset's name has at most {LONGEST_NAME}.")
    teachers = context.upstream.teachers
    return _EMPTY.format(
        teacher=flow_text(teachers[0].target) if teachers else "", data=flow_text(data) if data else ""
    ).replace(" \n", "\n")


def _text_of(run: run_pb2.Run) -> str:
    """The settings that a run was created with, as a run file."""
    title = "".join(each if each.isprintable() else " " for each in run.spec.display_name)
    named = f", {title[:LONGEST_NAME]}" if title else ""
    return f"# Settings of run {run_id(run.name)}{named}\n{document_text(set_fields(run.spec))}"


async def _get(context: WebContext, caller: Caller, run: str) -> run_pb2.Run:
    message = run_pb2.GetRunRequest(name=f"runs/{run}")
    response: run_pb2.Run = await caller.call(context.upstream.trainer, "GetRun", message)
    return response
