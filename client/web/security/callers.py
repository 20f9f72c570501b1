"""Callers: the token or session of a request, and the token that its calls to the services carry."""

from __future__ import annotations

import hmac
from collections.abc import AsyncGenerator, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from google.protobuf.message import Message
from starlette.requests import HTTPConnection

from stillhouse.client.core.settings import MAX_TOKEN_BYTES
from stillhouse.client.web.security.sessions import COOKIE, Session, Sessions
from stillhouse.client.web.upstream import CALL_TIMEOUT_S, Service, Upstream
from stillhouse.protos.errors import Reason, StillhouseError

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
CSRF_HEADER = "x-csrf-token"
_BEARER = "bearer "


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """The maker of a request, and the credentials with which the services are called."""

    token: str | None = field(repr=False)
    """Its own token; None for nobody in particular, and for the server's own credentials."""
    is_server: bool = False
    """True if it may use the server's own credentials."""
    guarded: bool = False
    """True if its token counts only where a service checks it."""
    session: Session | None = None
    address: str = ""
    """Address that the request came from."""

    @property
    def name(self) -> str:
        """Counts its open streams."""
        return self.address if self.session is None else f"session {id(self.session)}"

    @property
    def credentials(self) -> tuple[bool, str | None]:
        """Credentials that calls of the caller carry; readers of one stream have the same."""
        return self.is_server, self.token

    async def call(
        self, service: Service, rpc: str, request: Message, *, timeout_s: float = CALL_TIMEOUT_S
    ) -> Any:
        """Makes a unary call as this caller. Raises StillhouseError."""
        await self.check(service)
        return await service.call(rpc, request, self.token, timeout_s=timeout_s)

    async def stream(
        self, service: Service, rpc: str, request: Message | Iterable[Message]
    ) -> AsyncGenerator[Any, None]:
        """Yields the responses of a streaming call as this caller. Raises StillhouseError."""
        await self.check(service)
        async for response in service.stream(rpc, request, self.token):
            yield response

    async def admit(self, service: Service) -> None:
        """Raises StillhouseError if `service` does not let the caller read, before a body is read for it."""
        await self.check(service)
        await service.probe(self.token)

    async def check(self, service: Service) -> None:
        """Raises StillhouseError(UNAUTHENTICATED) if nothing proves the caller to `service`."""
        if not self.guarded or self.is_server:
            return
        if self.token is None:
            raise unauthenticated("This server requires a token, and the request has none.")
        if not await service.checks_tokens():
            raise unauthenticated(
                f"The {service.kind} at {service.target} requires no tokens, so it cannot tell what this one allows."
            )


class Callers:
    """Finds the caller of a request. Bearer tokens come first, then the session of the cookie."""

    def __init__(self, upstream: Upstream, *, guarded: bool, sign_in: str | None, https: bool) -> None:
        """`sign_in` is the line that stands for the server's own credentials."""
        self.sessions = Sessions()
        self.cookie = f"__Host-{COOKIE}" if https else COOKIE
        self._upstream = upstream
        self._guarded = guarded
        self._sign_in = sign_in

    @property
    def guarded(self) -> bool:
        """True if nobody is served without a token or session."""
        return self._guarded

    def of(self, request: HTTPConnection) -> Caller:
        """The caller; whether its token is good is for the services to say.

        Raises StillhouseError: UNAUTHENTICATED for a malformed header, PERMISSION_DENIED for a request of a session that
        would change something and lacks its CSRF token.
        """
        header = request.headers.get("authorization")
        if header is not None:
            if not header.lower().startswith(_BEARER):
                raise unauthenticated('The header "authorization" must hold "Bearer TOKEN".')
            return replace(self.holder_of(header[len(_BEARER) :].strip()), address=_address_of(request))
        session = self.session_of(request)
        if session is None:
            return Caller(token=None, guarded=self._guarded, address=_address_of(request))
        if request.scope["method"] not in SAFE_METHODS and not session.has_csrf_token(
            request.headers.get(CSRF_HEADER, "")
        ):
            raise StillhouseError(
                Reason.PERMISSION_DENIED,
                f"A request that changes something needs the session's token in the header {CSRF_HEADER}; "
                "GET /api/v1/session tells it.",
            )
        return self._caller(session.token, is_server=session.token is None, session=session)

    def holder_of(self, secret: str) -> Caller:
        """The caller whose token, or the server's sign-in line, is `secret`."""
        if not secret or len(secret) > MAX_TOKEN_BYTES or not secret.isascii() or not secret.isprintable():
            raise unauthenticated("The token is not one line of ASCII.")
        is_server = self._sign_in is not None and hmac.compare_digest(secret, self._sign_in)
        return self._caller(None if is_server else secret, is_server=is_server)

    def session_of(self, request: HTTPConnection) -> Session | None:
        """The session of the request's cookie."""
        value = cookie_of(request.headers.get("cookie", ""), self.cookie)
        return self.sessions.find(value) if value else None

    async def access(self, caller: Caller) -> dict[str, str]:
        """By service: "allowed", or the reason for which it does not let the caller read."""
        result = {}
        for name, service in self._named():
            try:
                await caller.check(service)
                refusal = await service.access(caller.token)
                result[name] = "allowed" if refusal is None else str(refusal)
            except StillhouseError as error:
                result[name] = str(error.reason)
        return result

    async def check_known(self, access: Mapping[str, str]) -> None:
        """Raises StillhouseError unless some service knows a caller's token; `access` is what `access` has returned for it.

        A service that checks no tokens allows all of them and knows none; if no other responds, any token passes.
        """
        answers = set(access.values())
        if Reason.PERMISSION_DENIED in answers:
            return
        allowing = [service for name, service in self._named() if access[name] == "allowed"]
        if allowing and Reason.UNAUTHENTICATED not in answers:
            return
        if any([await each.checks_tokens() for each in allowing]):
            return
        if Reason.UNAUTHENTICATED in answers:
            raise unauthenticated("No service accepts this token.")
        raise StillhouseError(
            Reason.SERVICE_UNREACHABLE,
            "No service responds, so the token cannot be checked. Try again once one does.",
        )

    def _named(self) -> list[tuple[str, Service]]:
        teachers = self._upstream.teachers
        return [("trainer", self._upstream.trainer)] + [
            (f"teachers/{number}", each) for number, each in enumerate(teachers, 1)
        ]

    def _caller(self, token: str | None, *, is_server: bool, session: Session | None = None) -> Caller:
        if is_server:
            token = self._upstream.settings.token()
        return Caller(token=token, is_server=is_server, guarded=self._guarded, session=session)


def _address_of(request: HTTPConnection) -> str:
    return request.client.host if request.client is not None else ""


def cookie_of(header: str, name: str) -> str:
    """The value of a cookie in the header of all; empty if there is none."""
    pairs = (part.strip().partition("=") for part in header.split(";"))
    return next((value for key, _, value in pairs if key == name), "")


def unauthenticated(problem: str) -> StillhouseError:
    """The error of a request that proves nothing."""
    return StillhouseError(
        Reason.UNAUTHENTICATED,
        f'{problem} Sign in, or send "Authorization: Bearer TOKEN" with a token of the service, or with the line of the '
        "server's sign-in file.",
    )
