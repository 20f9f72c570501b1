"""Translates what a servicer raises into a rich status, and refuses calls while the service drains."""

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
_PUSHBACK_KEY = "grpc-retry-pushback-ms"

log = structlog.get_logger(__name__)


class ErrorInterceptor(RpcInterceptor):
    """Makes a status of every exception of a servicer, for all four kinds of rpc.

    A servicer is async and raises; nothing else ends calls. A response stream whose caller hangs up is closed
    at once, so that a `finally` in it runs. A cancellation stays one: it is never INTERNAL.
    """

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        """`observers` are told of every call that has ended, except those of health and reflection."""
        self.draining = False
        """While true, calls are refused with DRAINING."""
        self._observers = tuple(observers)
        self._calls: set[object] = set()
        self._running: Counter[str] = Counter()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_calls(self) -> int:
        """Calls in progress, those of health and reflection apart."""
        return len(self._calls)

    @property
    def running(self) -> dict[str, int]:
        """Calls in progress by full name of their rpc."""
        return dict(self._running)

    async def wait_idle(self) -> None:
        """Returns once no call is in progress."""
        await self._idle.wait()

    def wrap_handler(self, handler: Any, details: grpc.HandlerCallDetails) -> Any:
        """The handler, guarded."""
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
        seen = _Seen(what=resource_of(request))
        try:
            with (
                structlog.contextvars.bound_contextvars(rpc=method, peer=context.peer()),
                server_span(method, context) as span,
            ):
                try:
                    return await self._answer(behaviour, request, context, seen)
                finally:
                    span.set_outcome(seen.outcome)
        finally:
            self._calls.discard(call)
            self._running[method] -= 1
            if not self._calls:
                self._idle.set()
            self._tell(method, context, seen, time.monotonic() - began_s)

    def _tell(self, method: str, context: Any, seen: "_Seen", seconds: float) -> None:
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

    async def _answer(self, behaviour: Behaviour, request: Any, context: Any, seen: "_Seen") -> Any:
        try:
            self._admit()
            answer = await respond(behaviour, check_decoded(request), context)
            seen.outcome, seen.what = OK, resource_of(answer, request)
        except (grpc.aio.AbortError, grpc.aio.InternalError):
            raise  # a status is on its way, or the connection is gone
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # a cancellation, or a group that holds one
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise  # the caller hung up or the server ends; gRPC knows
            if context.done():
                return None  # nobody is left to tell
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


class _Seen:
    """What is known of a call so far; one that ends without a word was cancelled."""

    __slots__ = ("outcome", "what")

    def __init__(self, what: str) -> None:
        self.what = what
        self.outcome = Reason.CANCELLED.value


async def _abort(context: Any, status: status_pb2.Status) -> None:
    error = from_status(status)
    if error.reason != Reason.INTERNAL:  # whose cause is in the log already
        log.info("call refused", reason=error.reason.value, message=error.message)
    answer = rpc_status.to_status(status)
    metadata = list(answer.trailing_metadata)
    if error.retry_after_s is not None:
        metadata.append((_PUSHBACK_KEY, str(round(error.retry_after_s * 1000))))
    elif not error.retryable:
        metadata.append((_PUSHBACK_KEY, "-1"))  # repeating it is useless
    await context.abort(answer.code, answer.details, tuple(metadata))
