"""Signing in and out: a session cookie in exchange for a token, and what it allows."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from stillhouse.client.core.settings import MAX_TOKEN_BYTES
from stillhouse.client.web.api.context import WebContext
from stillhouse.client.web.api.messages import check_names, invalid, read_json
from stillhouse.client.web.problems import JsonResponse
from stillhouse.client.web.security.callers import Caller, cookie_of
from stillhouse.client.web.security.sessions import LIFETIME_S

MAX_SIGN_IN_BYTES = 2 * MAX_TOKEN_BYTES


async def get_session(context: WebContext, request: Request) -> Response:
    """Tells the caller, what it may use, and the CSRF token of its session."""
    check_names(request.query_params, ())
    caller = context.callers.of(request)
    access = await context.callers.access(caller)
    if caller.session is None and caller.token is not None and not caller.is_server:
        await context.callers.check_known(access)  # the rate limit of wrong tokens counts refusals
    return JsonResponse(_document(caller, access))


async def sign_in(context: WebContext, request: Request) -> Response:
    """Starts a session for {"token": TOKEN}, which must be one of a service, or the line of the sign-in file.

    The session that the request has ends.
    """
    check_names(request.query_params, ())
    body = await read_json(request, limit=MAX_SIGN_IN_BYTES)
    secret = body.get("token")
    if not isinstance(secret, str) or set(body) != {"token"}:
        raise invalid("token", 'the body must be {"token": "..."}.')
    caller = context.callers.holder_of(secret.strip())
    access = await context.callers.access(caller)
    if not caller.is_server:
        await context.callers.check_known(access)
    context.callers.sessions.end(_cookie(context, request))
    value, session = context.callers.sessions.start(caller.token if not caller.is_server else None)
    signed_in = Caller(
        token=caller.token, is_server=caller.is_server, guarded=caller.guarded, session=session
    )
    response = JsonResponse(_document(signed_in, access), 201)
    _set_cookie(context, response, value, int(LIFETIME_S))
    return response


async def sign_out(context: WebContext, request: Request) -> Response:
    """Ends the session of the cookie."""
    check_names(request.query_params, ())
    if context.callers.session_of(request) is not None:
        context.callers.of(request)  # checks the CSRF token
        context.callers.sessions.end(_cookie(context, request))
    response = Response(status_code=204)
    _set_cookie(context, response, "", 0)
    return response


async def check_knows(context: WebContext, caller: Caller) -> None:
    """Raises StillhouseError unless some service knows the caller, where nobody else is served."""
    if caller.guarded and not caller.is_server:
        await context.callers.check_known(await context.callers.access(caller))


def _document(caller: Caller, access: dict[str, str]) -> dict[str, Any]:
    kind = "server" if caller.is_server else "token" if caller.token is not None else "anonymous"
    return {
        "kind": kind,
        "csrf_token": caller.session.csrf_token if caller.session is not None else None,
        "access": access,
    }


def _cookie(context: WebContext, request: Request) -> str:
    return cookie_of(request.headers.get("cookie", ""), context.callers.cookie)


def _set_cookie(context: WebContext, response: Response, value: str, max_age_s: int) -> None:
    response.set_cookie(
        context.callers.cookie,
        value,
        max_age=max_age_s,
        path="/",
        secure=context.settings.https,
        httponly=True,
        samesite="strict",
    )
