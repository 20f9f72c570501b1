"""ASGI middleware around every request: Host, Origin and rate are checked, headers set, the outcome logged."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, MutableMapping
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from stillhouse.client.web.security.callers import SAFE_METHODS, Callers
from stillhouse.client.web.security.origins import check_origin
from stillhouse.client.web.security.rates import RateLimit
from stillhouse.client.web.security.sessions import Session
from stillhouse.protos.errors import StillhouseError, from_status, to_status

REQUESTS_PER_S, REQUESTS_AT_ONCE = 100.0, 1000
REFUSALS_PER_S, REFUSALS_AT_ONCE = 0.5, 20
"""Requests with a wrong token or sign-in."""
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; font-src 'self'; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "cache-control": "no-store",
}
"""Headers of every response that does not set them itself."""
HTTPS_HEADERS = {"strict-transport-security": "max-age=31536000"}

log = structlog.get_logger(__name__)


class Guard:
    """Checks a request before any route sees it."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        callers: Callers,
        host_names: Collection[str],
        https: bool,
        refuse: Callable[[str, StillhouseError], Response],
    ) -> None:
        """`refuse` makes the response to a path from an error."""
        self._app, self._refuse = app, refuse
        self._callers = callers
        self._host_names = host_names
        self._headers = HEADERS | (HTTPS_HEADERS if https else {})
        self._requests = RateLimit("requests", per_s=REQUESTS_PER_S, burst=REQUESTS_AT_ONCE)
        self._refusals = RateLimit("wrong tokens", per_s=REFUSALS_PER_S, burst=REFUSALS_AT_ONCE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        outcome = _Outcome(send, self._headers)
        began_s = time.monotonic()
        session = self._callers.session_of(HTTPConnection(scope))
        prover = _prover_of(scope, session)
        try:
            try:
                self._admit(scope, session, prover)
                await self._app(scope, receive, outcome.send)
            except Exception as error:
                failure = from_status(to_status(error))
                if outcome.status:
                    raise  # the response has begun; the connection is cut
                await self._refuse(scope["path"], failure)(scope, receive, outcome.send)
        finally:
            if outcome.status == 401 and _proves(scope):
                with contextlib.suppress(StillhouseError):
                    self._refusals.take(prover)
            write = log.debug if scope["method"] in SAFE_METHODS and outcome.status < 400 else log.info
            write(
                "request",
                method=scope["method"],
                path=scope["path"][:200],
                status=outcome.status,
                ms=round(1000 * (time.monotonic() - began_s), 1),
            )

    def _admit(self, scope: Scope, session: Session | None, prover: str) -> None:
        check_origin(scope["method"], Headers(scope=scope), self._host_names)
        self._requests.take(_address_of(scope) if session is None else f"session {id(session)}")
        if _proves(scope):
            self._refusals.check(prover)


def _proves(scope: Scope) -> bool:
    """True for a request that brings a token."""
    return "authorization" in Headers(scope=scope) or scope["method"] not in SAFE_METHODS


def _prover_of(scope: Scope, session: Session | None) -> str:
    """The party that a wrong token counts against: the holder of a session, by all of his sessions together, else an address."""
    return _address_of(scope) if session is None else f"holder {hash(session.token)}"


class _Outcome:
    """Passes messages of a response on, with headers added, and keeps its status."""

    def __init__(self, send: Send, headers: MutableMapping[str, str] | dict[str, str]) -> None:
        self._send, self._headers = send, headers
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in self._headers.items():
                headers.setdefault(name, value)
        await self._send(message)


def _address_of(scope: MutableMapping[str, Any]) -> str:
    return str((scope.get("client") or ("",))[0])
