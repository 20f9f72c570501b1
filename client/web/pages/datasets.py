"""Pages of datasets: the list with its upload, and one dataset as a run reads it."""

from __future__ import annotations

from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import check_names
from stillhouse.client.web.pages.new_run import known_models
from stillhouse.client.web.pages.rendering import render
from stillhouse.client.web.pages.views import frame_of
from stillhouse.protos.rows.row_forms import FORMATS
from stillhouse.protos.stillhouse.v1 import run_pb2

PAGE_DATASETS = 50


async def show_datasets(context: WebContext, request: Request) -> Response:
    """The datasets of the run service, newest first, or the versions of one id."""
    query = request.query_params
    check_names(query, ("dataset_id", "page_token"))
    caller = context.callers.of(request)
    chosen = query.get("dataset_id", "")
    message = run_pb2.ListDatasetsRequest(
        page_size=PAGE_DATASETS, dataset_id=chosen, page_token=query.get("page_token", "")
    )
    listed = await caller.call(context.upstream.trainer, "ListDatasets", message)
    following = {"dataset_id": chosen, "page_token": listed.next_page_token}
    return render(
        "data/list.html",
        **frame_of(context, request),
        datasets=listed.datasets,
        chosen=chosen,
        page_token=message.page_token,
        next_query=urlencode({name: value for name, value in following.items() if value})
        if listed.next_page_token
        else "",
        max_bytes=context.settings.max_upload_bytes,
    )


async def show_dataset(context: WebContext, request: Request) -> Response:
    """One dataset, and the runs that use it."""
    check_names(request.query_params, ())
    caller = context.callers.of(request)
    message = run_pb2.GetDatasetRequest(name=f"datasets/{request.path_params['dataset']}")
    dataset = await caller.call(context.upstream.trainer, "GetDataset", message)
    return render(
        "data/dataset.html",
        **frame_of(context, request),
        dataset=dataset,
        formats=FORMATS,
        models=await known_models(context, caller),
    )
