"""Puts the web application together: services, callers, routes and the guard around them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.web.api.compatibility import add_task_routes
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.handlers import add_route, add_routes
from stillhouse.client.web.api.routes import PREFIX
from stillhouse.client.web.openai.errors import PREFIX as OPENAI_PREFIX
from stillhouse.client.web.openai.errors import error_response
from stillhouse.client.web.openai.handlers import add_openai_routes
from stillhouse.client.web.openapi.document import document
from stillhouse.client.web.pages.routes import add_pages
from stillhouse.client.web.problems import JsonResponse, not_found, problem_response
from stillhouse.client.web.security.callers import Callers
from stillhouse.client.web.security.guard import Guard
from stillhouse.client.web.security.sign_in_file import read_or_make
from stillhouse.client.web.settings import WebSettings
from stillhouse.client.web.teachers.handlers import add_teacher_routes
from stillhouse.client.web.upstream import Upstream
from stillhouse.protos.errors import Reason, StillhouseError

OPENAPI_PATH = f"{PREFIX}/openapi.json"


class WebApp:
    """The ASGI application and its context. Create it in the running loop; close it at the end."""

    def __init__(self, settings: WebSettings) -> None:
        """Raises StillhouseError if a certificate, token or the sign-in file cannot be read."""
        upstream = Upstream(settings.services)
        sign_in = read_or_make(settings.sign_in_path) if settings.guarded else None
        callers = Callers(upstream, guarded=settings.guarded, sign_in=sign_in, https=settings.https)
        self.context = WebContext(settings=settings, upstream=upstream, callers=callers)
        fastapi = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
        add_routes(fastapi, self.context)
        add_task_routes(fastapi, self.context)
        add_teacher_routes(fastapi, self.context)
        self._batches = add_openai_routes(fastapi, self.context)
        add_route(fastapi, "GET", OPENAPI_PATH, _openapi)
        add_pages(fastapi, self.context)
        fastapi.add_exception_handler(HTTPException, _no_route)
        self.asgi = Guard(
            fastapi, callers=callers, host_names=settings.host_names, https=settings.https, refuse=_refusal
        )

    async def close(self) -> None:
        """Ends streams and channels."""
        self.context.close_streams()
        await self.context.streams.close()
        await self._batches.close()
        for service in self.context.upstream.services:
            await service.close()


@asynccontextmanager
async def web_app(settings: WebSettings) -> AsyncIterator[WebApp]:
    """The application, closed at the end of the block."""
    app = WebApp(settings)
    try:
        yield app
    finally:
        await app.close()


async def _openapi(_request: Request) -> Response:
    return JsonResponse(document())


async def _no_route(request: Request, error: Exception) -> Response:
    """Answers paths and methods that no route has."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        return _refusal(path, not_found(path))
    problem = StillhouseError(
        Reason.INVALID_REQUEST, f"{request.method[:20]} is no method of {path[:200]!r}: {error.detail}."
    )
    response = _refusal(path, problem, error.status_code)
    response.headers.update(error.headers or {})
    return response


def _refusal(path: str, error: StillhouseError, status: int | None = None) -> Response:
    """The response to a request that no handler answers, in the form of its path."""
    respond = error_response if path.startswith(f"{OPENAI_PREFIX}/") else problem_response
    return respond(error, status)
