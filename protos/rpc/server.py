"""gRPC server of both services: limits, TLS, health, reflection and graceful shutdown."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import Any

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.auth import AuthInterceptor, TokenFile
from stillhouse.protos.rpc.call_limit import CallLimit
from stillhouse.protos.rpc.channel import (
    KEEPALIVE_S,
    KEEPALIVE_TIMEOUT_S,
    METADATA_LIMIT_BYTES,
    RECEIVE_LIMIT_BYTES,
    is_loopback,
)
from stillhouse.protos.rpc.error_interceptor import ErrorInterceptor
from stillhouse.protos.rpc.signals import END_SIGNALS, keep_signals
from stillhouse.protos.rpc.tls import ServerTls, server_credentials
from stillhouse.protos.telemetry.call_record import Observer

_LAST_WORDS_S = 1.0
"""Time for the trailers of the last calls to be sent."""
_ALL_CALLS = 4
"""Bound of gRPC itself, as a multiple of `max_calls`: it also covers health, reflection and calls that are refused."""
_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", RECEIVE_LIMIT_BYTES),
    ("grpc.max_send_message_length", RECEIVE_LIMIT_BYTES),
    ("grpc.max_metadata_size", METADATA_LIMIT_BYTES),
    ("grpc.absolute_max_metadata_size", 2 * METADATA_LIMIT_BYTES),
    ("grpc.keepalive_time_ms", KEEPALIVE_S * 1000),
    ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_S * 1000),
    (
        "grpc.http2.ping_timeout_ms",
        KEEPALIVE_TIMEOUT_S * 1000,
    ),  # for every ping, since a keepalive may queue behind one
    ("grpc.keepalive_permit_without_calls", 1),
    # Callers ping while a long call is silent; that is keepalive, not abuse.
    ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_TIMEOUT_S * 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake
)

log = structlog.get_logger(__name__)


class Server:
    """A grpc.aio server; add servicers to `aio` before `start`. Create it inside the running loop."""

    def __init__(
        self,
        *,
        listen: str,
        tls: ServerTls | None,
        insecure: bool,
        reflection: bool | None,
        services: Sequence[str],
        max_calls: int,
        limited: Collection[str] | None = None,
        tokens: TokenFile | None = None,
        observers: Sequence[Observer] = (),
        signals: asyncio.Queue[signal.Signals] | None = None,
    ) -> None:
        """`listen` is HOST:PORT, where port 0 means any free one, or unix:PATH. `services` are full names, for health.

        `reflection` is on for loopback if None. At most `max_calls` of the `limited` rpcs run at once (None: of all).
        `tokens` are those that calls need; `observers` receive a record of every call that has ended. `signals` are those
        of `keep_signals`, which `run_until_signal` calls if None. Raises StillhouseError(INVALID_CONFIG) for an address that
        another machine can reach without TLS, or without tokens or certificates of callers, unless `insecure`.
        """
        if tls is None and not insecure and not is_loopback(listen):
            raise StillhouseError(
                Reason.INVALID_CONFIG,
                f"{listen} is reachable from other machines, and nothing would be encrypted. Give --tls-cert and "
                "--tls-key, listen on 127.0.0.1, or accept it with --insecure.",
            )
        proves_callers = (tls is not None and tls.client_ca is not None) or (
            tokens is not None and tokens.required
        )
        if not proves_callers and not insecure and not is_loopback(listen):
            raise StillhouseError(
                Reason.INVALID_CONFIG,
                f"{listen} is reachable from other machines, and anyone there could use this service. Create a token "
                "with `stillhouse token create`, require client certificates with --tls-client-ca, or accept it "
                "with --insecure.",
            )
        self._listen, self._tls = listen, tls
        self._names = (*services, "")
        self._errors = ErrorInterceptor(observers)
        self.limit = CallLimit(max_calls, methods=limited)
        self._tasks: set[asyncio.Task[None]] = set()
        self._signals = signals
        self.aio: grpc.aio.Server = grpc.aio.server(
            interceptors=[self._errors, AuthInterceptor(tokens), self.limit],
            options=list(_OPTIONS),
            maximum_concurrent_rpcs=_ALL_CALLS * max_calls,
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.aio)
        self.set_serving(False)
        if is_loopback(listen) if reflection is None else reflection:
            _reflect(self.aio, services)

    @property
    def running(self) -> dict[str, int]:
        """Calls in progress by full rpc name, without health and reflection."""
        return self._errors.running

    async def start(self) -> str:
        """Listens and returns the bound address. Health is NOT_SERVING until set_serving(True).

        Raises StillhouseError(INVALID_CONFIG) if the address cannot be bound or a PEM file cannot be used.
        """
        try:
            if self._tls is None:
                port = self.aio.add_insecure_port(self._listen)
            else:
                port = self.aio.add_secure_port(self._listen, server_credentials(self._tls))
        except (RuntimeError, ValueError) as error:
            raise StillhouseError(
                Reason.INVALID_CONFIG,
                f"The service cannot listen on {self._listen}: the address is taken or not this machine's, or its TLS "
                f"files do not match ({error}). Choose another --listen, or port 0 for any.",
            ) from error
        await self.aio.start()
        if self._listen.startswith("unix"):
            return self._listen
        return f"{self._listen.rpartition(':')[0]}:{port}"

    def set_serving(self, serving: bool) -> None:
        """Sets the health status of the server and each of its services."""
        status = (
            health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        )

        async def tell() -> None:
            for name in self._names:
                await self._health.set(name, status)

        task = asyncio.get_running_loop().create_task(tell())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def run_until_signal(self, drain: Callable[[], Awaitable[None]], grace_s: float) -> None:
        """Serves until SIGTERM, SIGINT or `stop`, then shuts down gracefully.

        On the first signal health becomes NOT_SERVING, further calls are refused with DRAINING, and `drain` is
        awaited, which ends the long streams of a service. After `grace_s`, or on the second signal, the remaining
        calls are cancelled.
        """
        loop = asyncio.get_running_loop()
        signals = keep_signals() if self._signals is None else self._signals
        first, ended = loop.create_task(signals.get()), loop.create_task(_ended(self.aio))
        hasten: asyncio.Task[signal.Signals] | None = None
        try:
            await asyncio.wait({first, ended}, return_when=asyncio.FIRST_COMPLETED)
            if first.done():
                log.info(
                    "draining", signal=first.result().name, calls=self._errors.num_calls, grace_s=grace_s
                )
                hasten = loop.create_task(signals.get())
                await self._drain(drain, grace_s, hasten)
        finally:
            for task in (first, ended, hasten):
                if task is not None:
                    task.cancel()
            for number in END_SIGNALS:
                loop.remove_signal_handler(number)

    async def _drain(
        self, drain: Callable[[], Awaitable[None]], grace_s: float, hasten: asyncio.Task[signal.Signals]
    ) -> None:
        self.set_serving(False)
        self._errors.draining = True

        async def finish() -> None:
            await drain()
            await self._errors.wait_idle()

        finishing = asyncio.ensure_future(finish())
        await asyncio.wait({finishing, hasten}, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED)
        if finishing.done():
            await self.stop(_LAST_WORDS_S)
            finishing.result()
        else:
            log.warning("calls cut off", calls=self._errors.num_calls, hastened=hasten.done())
            finishing.cancel()
            await self.stop(0)
            await asyncio.wait({finishing}, timeout=_LAST_WORDS_S)

    async def stop(self, grace_s: float) -> None:
        """Accepts no more calls, waits `grace_s` for those in progress, and cancels the rest."""
        await self.aio.stop(grace_s or None)


async def _ended(server: grpc.aio.Server) -> None:
    await server.wait_for_termination()


def _reflect(server: grpc.aio.Server, services: Sequence[str]) -> None:
    names = (*services, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
