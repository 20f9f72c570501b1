"""Authentication and scopes: each rpc needs one scope, unlisted rpcs are refused, before any request body is read."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc import tokens as auth_tokens
from stillhouse.protos.rpc.interceptor_base import Behaviour, RpcInterceptor, with_behaviour
from stillhouse.protos.rpc.tokens import Scope, Token, time_text
from stillhouse.protos.telemetry.call_record import Caller

_TEACHER, _RUNS = "/stillhouse.v1.TeacherService/", "/stillhouse.v1.RunService/"
SCOPES: Mapping[str, Scope] = {
    _TEACHER + "GetTeacherInfo": Scope.INFER,
    _TEACHER + "GetTokenizer": Scope.INFER,
    _TEACHER + "Generate": Scope.INFER,
    _TEACHER + "Score": Scope.INFER,
    _TEACHER + "UploadAdapter": Scope.ADMIN,
    _TEACHER + "LoadAdapter": Scope.ADMIN,
    _TEACHER + "UnloadAdapter": Scope.ADMIN,
    _RUNS + "CreateRun": Scope.SUBMIT,
    _RUNS + "GetRun": Scope.SUBMIT,
    _RUNS + "ListRuns": Scope.SUBMIT,
    _RUNS + "WatchRun": Scope.SUBMIT,
    # A token without admin controls its own runs only in these four; the servicer checks that.
    _RUNS + "StopRun": Scope.SUBMIT,
    _RUNS + "ResumeRun": Scope.SUBMIT,
    _RUNS + "DeleteRun": Scope.SUBMIT,
    _RUNS + "AttachResult": Scope.SUBMIT,
    _RUNS + "QueryMetrics": Scope.SUBMIT,
    _RUNS + "UploadDataset": Scope.SUBMIT,
    _RUNS + "InspectRows": Scope.SUBMIT,
    _RUNS + "InspectDataset": Scope.SUBMIT,
    _RUNS + "InspectStudent": Scope.SUBMIT,
    _RUNS + "ListDatasets": Scope.SUBMIT,
    _RUNS + "GetDataset": Scope.SUBMIT,
    # As for runs: without admin a token deletes only what it uploaded.
    _RUNS + "DeleteDataset": Scope.SUBMIT,
    _RUNS + "ListArtifacts": Scope.SUBMIT,
    _RUNS + "DownloadArtifact": Scope.SUBMIT,
    _RUNS + "StreamLogs": Scope.SUBMIT,
}
"""Required scope by rpc."""
_HEADER = "authorization"
_BEARER = "bearer "

log = structlog.get_logger(__name__)


ANONYMOUS = Caller(name="", is_admin=True)
_caller: ContextVar[Caller] = ContextVar("stillhouse_caller", default=ANONYMOUS)


def current_caller() -> Caller:
    """The caller of the current rpc."""
    return _caller.get()


class TokenFile:
    """Tokens that a service accepts; a changed file applies from the next call on.

    A file that becomes unusable accepts no token. If `optional`, a file that never existed requires none.
    """

    def __init__(self, path: Path, *, optional: bool = False) -> None:
        """Raises StillhouseError(INVALID_CONFIG) if the file cannot be used."""
        self.path = path
        self._tokens: Mapping[str, Token] | None = None
        self._seen: object = None
        if path.exists() or not optional:
            self._seen = self._signature()
            self._tokens = auth_tokens.read(path)

    @property
    def required(self) -> bool:
        """True if calls need a token."""
        self._refresh()
        return self._tokens is not None

    def lookup(self, secret: str) -> Token | None:
        """The entry of a token; None if it is unknown or revoked."""
        self._refresh()
        return auth_tokens.lookup(self._tokens or {}, secret)

    def _refresh(self) -> None:
        signature = self._signature()
        if signature == self._seen:
            return
        self._seen = signature
        try:
            self._tokens = auth_tokens.read(self.path)
            log.info("tokens read", file=str(self.path), tokens=len(self._tokens))
        except StillhouseError as error:
            self._tokens = {}
            log.error("no token is accepted", why=error.message)  # noqa: TRY400 - no bug, so no traceback

    def _signature(self) -> object:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size, status.st_mode


class AuthInterceptor(RpcInterceptor):
    """Admits a call if its token has the rpc's scope, and sets `current_caller`."""

    def __init__(self, tokens: TokenFile | None) -> None:
        """Without `tokens` none are required; an rpc without an entry in SCOPES is still refused."""
        self._tokens = tokens

    def wrap_handler(self, handler: Any, details: grpc.HandlerCallDetails) -> Any:
        """The handler with a caller, or one that refuses before any byte of the request body is read."""
        try:
            caller = self._authorise(details.method, details.invocation_metadata or ())
        except StillhouseError as error:
            return _refusing(error)
        return _as_caller(handler, caller)

    def _authorise(self, method: str, metadata: Any) -> Caller | None:
        scope = SCOPES.get(method)
        name = method.rpartition("/")[2]
        if scope is None:
            raise StillhouseError(
                Reason.PERMISSION_DENIED,
                f"{name} has no entry in this service's table of scopes, so it cannot be called.",
            )
        if self._tokens is None or not self._tokens.required:
            return None
        token = self._tokens.lookup(_bearer(metadata))
        if token is None:
            raise _unauthenticated("The token is unknown to this service, or was revoked.")
        _caller.set(Caller(name=token.name, is_admin=token.allows(Scope.ADMIN)))
        if token.expired():
            assert token.expire_time_s is not None
            raise _unauthenticated(f'The token "{token.name}" expired at {time_text(token.expire_time_s)}.')
        if not token.allows(scope):
            scopes = ", ".join(sorted(token.scopes))
            raise StillhouseError(
                Reason.PERMISSION_DENIED,
                f'{name} needs the scope {scope}; the token "{token.name}" has {scopes}. Use another token, or have the '
                f"service's operator create one with `stillhouse token create --scope {scope}`.",
                metadata={"scope": scope},
            )
        return current_caller()


def _bearer(metadata: Any) -> str:
    given = [value for key, value in metadata if key == _HEADER]
    if not given:
        raise _unauthenticated("This service requires a token, and the call has none.")
    text = given[0].decode("utf-8", "replace") if isinstance(given[0], bytes) else str(given[0])
    if len(given) > 1 or not text.lower().startswith(_BEARER):
        raise _unauthenticated('The header "authorization" must occur once and hold "Bearer TOKEN".')
    return text[len(_BEARER) :].strip()


def _unauthenticated(problem: str) -> StillhouseError:
    return StillhouseError(
        Reason.UNAUTHENTICATED,
        f"{problem} Give a file with a valid token by --token-file or STILLHOUSE_TOKEN_FILE; the service's "
        "operator creates one with `stillhouse token create`.",
    )


def _refusing(error: StillhouseError) -> Any:
    """A handler that ends the call with `error`; a stream handler, since gRPC reads no request before calling it."""

    async def refuse(_requests: Any, _context: Any) -> None:
        raise error

    return grpc.stream_stream_rpc_method_handler(refuse)


def _as_caller(handler: Any, caller: Caller | None) -> Any:
    """Sets `current_caller` for the handler: by token, else by certificate."""

    def called_by(behaviour: Behaviour) -> Behaviour:
        def called(request: Any, context: Any) -> Any:
            _caller.set(caller if caller is not None else _from_certificate(context))
            return behaviour(request, context)

        return called

    return with_behaviour(handler, called_by)


def _from_certificate(context: Any) -> Caller:
    for subject in context.auth_context().get("x509_common_name", ()):
        return Caller(name=f"certificate:{subject.decode(errors='replace')[:128]}", is_admin=True)
    return ANONYMOUS
