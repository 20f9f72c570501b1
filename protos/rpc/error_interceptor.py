"""Translates exceptions of a servicer into a rich status, and refuses calls while the service drains."""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
import structlog
from google.rpc import status_pb2
from grpc_status import rpc_status

from stillhouse.protos.errors import Reason, StillhouseError, from_status, to_status
from stillhouse.protos.rpc.auth import current_caller
from stillhouse.protos.rpc.interceptor_base import (
    Behaviour,
    RpcInterceptor,
    check_decoded,
    decode_leniently,
    respond,
    with_behaviour,
)
from stillhouse.protos.telemetry.call_record import OK, CallRecord, Observer, resource_of
from stillhouse.protos.telemetry.tracing import server_span

DRAIN_RETRY_S = 2.0
LONGEST_PUSHBACK_S = 2.0
"""Longest pause that the channel makes by itself; a teacher that loads for longer is reported, and callers wait if they want."""
_PUSHBACK_KEY = "grpc-retry-pushback-ms"

log = structlog.get_logger(__name__)


class ErrorInterceptor(RpcInterceptor):
    """Turns every exception of a servicer into a status, for all four kinds of rpc.

    A response stream whose caller hangs up is closed at once, so that its `finally` runs. A cancellation stays a
    cancellation, never INTERNAL.
    """

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        """`observers` receive a record of every call that has ended, except health and reflection."""
        self.draining = False
        """Refuses calls with DRAINING while true."""
        self._observers = tuple(observers)
        self._calls: set[object] = set()
        self._running: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_calls(self) -> int:
        """Calls in progress, without health and reflection."""
        return len(self._calls)

    @property
    def running(self) -> dict[str, int]:
        """Calls in progress by full rpc name."""
        return dict(self._running)

    async def wait_idle(self) -> None:
        """Returns once no call is in progress."""
        await self._idle.wait()

    def wrap_handler(self, handler: Any, details: grpc.HandlerCallDetails) -> Any:
        """The handler with its exceptions translated."""
        method = details.method

        def guarded(behaviour: Behaviour) -> Behaviour:
            async def wrapped(request: Any, context: Any) -> Any:
                return await self._guard(behaviour, request, context, method)

            return wrapped

        return with_behaviour(decode_leniently(handler), guarded)

    async def _guard(self, behaviour: Behaviour, request: Any, context: Any, method: str) -> Any:
        call, began_s = object(), time.monotonic()
        self._calls.add(call)
        self._running[method] += 1
        self._idle.clear()
        seen = _CallState(what=resource_of(request))
        try:
            with (
                structlog.contextvars.bound_contextvars(rpc=method, peer=context.peer()),
                server_span(method, context) as span,
            ):
                try:
                    return await self._respond(behaviour, request, context, seen)
                finally:
                    span.set_outcome(seen.outcome)
        finally:
            self._calls.discard(call)
            self._running[method] -= 1
            if not self._calls:
                self._idle.set()
            self._observe(method, context, seen, time.monotonic() - began_s)

    def _observe(self, method: str, context: Any, seen: "_CallState", seconds: float) -> None:
        record = CallRecord(
            method=method,
            caller=current_caller(),
            peer=context.peer(),
            what=seen.what,
            outcome=seen.outcome,
            seconds=seconds,
        )
        for observer in self._observers:
            try:
                observer(record)
            except Exception:
                log.exception("call not observed", rpc=method)

    async def _respond(self, behaviour: Behaviour, request: Any, context: Any, seen: "_CallState") -> Any:
        try:
            self._admit()
            answer = await respond(behaviour, check_decoded(request), context)
            seen.outcome, seen.what = OK, resource_of(answer, request)
        except (grpc.aio.AbortError, grpc.aio.InternalError):
            raise  # a status was sent, or the connection is gone
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a cancellation, or a group that holds one
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # the caller hung up or the server stops; gRPC knows
            if context.done():
                return None  # the caller is gone
            status = to_status(error)
            seen.outcome = from_status(status).reason.value
            await _abort(context, status)
        else:
            return answer

    def _admit(self) -> None:
        if self.draining:
            raise StillhouseError(
                Reason.DRAINING,
                "This service is stopping and takes no further calls; retry when it is back.",
                retry_after_s=DRAIN_RETRY_S,
            )


class _CallState:
    """Outcome and resource of a call so far; CANCELLED until it ends otherwise."""

    __slots__ = ("outcome", "what")

    def __init__(self, what: str) -> None:
        self.what = what
        self.outcome = Reason.CANCELLED.value


async def _abort(context: Any, status: status_pb2.Status) -> None:
    error = from_status(status)
    if error.reason != Reason.INTERNAL:  # its cause is already logged
        log.info("call refused", reason=error.reason.value, message=error.message)
    answer = rpc_status.to_status(status)
    metadata = list(answer.trailing_metadata)
    if error.retry_after_s is not None and error.retry_after_s <= LONGEST_PUSHBACK_S:
        metadata.append((_PUSHBACK_KEY, str(round(error.retry_after_s * 1000))))
    elif error.retry_after_s is not None or not error.retryable:
        metadata.append((_PUSHBACK_KEY, "-1"))  # a retry cannot help, or only one that the caller knows of
    await context.abort(answer.code, answer.details, tuple(metadata))
