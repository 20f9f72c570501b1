"""Routes of the pages on a FastAPI application."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from urllib.parse import quote

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.pages import cache_view, teacher_view, token_view, views
from stillhouse.client.web.pages.datasets import show_dataset, show_datasets
from stillhouse.client.web.pages.failure import failure_of
from stillhouse.client.web.pages.new_run import show_new_run
from stillhouse.client.web.pages.rendering import render
from stillhouse.client.web.problems import error_headers, http_status
from stillhouse.protos.errors import Reason, StillhouseError, from_status, to_status

View = Callable[[WebContext, Request], Awaitable[Response]]
PAGES: Mapping[str, View] = {
    "/": views.show_runs,
    "/compare": views.compare,
    "/caches": cache_view.show_caches,
    "/teachers": teacher_view.show_teachers,
    "/teachers/load": teacher_view.show_teacher_load,
    "/sign-in": views.show_sign_in,
    "/runs/new": show_new_run,
    "/runs/{run}": views.show_run,
    "/runs/{run}/head": views.show_run_head,
    "/runs/{run}/artifacts": views.show_artifacts,
    "/data": show_datasets,
    "/data/{dataset}": show_dataset,
    "/runs/{run}/tokens": token_view.show_tokens,
    "/favicon.ico": views.icon,
    "/static/{digest}/{name:path}": views.static_file,
}


def add_pages(app: FastAPI, context: WebContext) -> None:
    """Adds every page."""
    for path, view in PAGES.items():
        _add(app, path, view, context)


def _add(app: FastAPI, path: str, view: View, context: WebContext) -> None:
    async def endpoint(request: Request) -> Response:
        try:
            return await view(context, request)
        except StillhouseError as error:
            return _failed(context, request, error)
        except Exception as error:
            return _failed(context, request, from_status(to_status(error)))  # a bug, which this logs

    app.add_api_route(path, endpoint, methods=["GET"], response_model=None, include_in_schema=False)


def _failed(context: WebContext, request: Request, error: StillhouseError) -> Response:
    """The page of an error; the sign-in page for a browser whom nothing proves.

    A wrong token in a header stays a 401, which the guard counts.
    """
    is_part = request.headers.get("hx-request") == "true"
    if error.reason == Reason.UNAUTHENTICATED and "authorization" not in request.headers:
        target = f"{request.url.path}?{request.url.query}" if request.url.query else request.url.path
        location = "/sign-in" if is_part else f"/sign-in?next={quote(target, safe='')}"
        if is_part:
            return Response(status_code=401, headers={"hx-redirect": location})
        return RedirectResponse(location, 303)
    status = http_status(error.reason)
    failure = failure_of(error)
    if is_part:
        response = render("failure.html", status, failure=failure)
    else:
        response = render("error.html", status, **views.frame_of(context, request), failure=failure)
    response.headers.update(error_headers(error, status))
    return response
