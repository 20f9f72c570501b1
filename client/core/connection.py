"""A channel to one service: errors of calls become StillhouseErrors, and lost streams are resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

import grpc

from stillhouse.protos.errors import StillhouseError, from_rpc_error
from stillhouse.protos.rpc.channel import ChannelOptions, connect, process_name
from stillhouse.protos.rpc.pool.bounded_wait import BoundedWait

R = TypeVar("R")

CALL_TIMEOUT_S = 60.0
PATIENCE_S = 600.0
"""Time without a service after which a lost stream is given up."""
CONNECTED_S = 30.0
"""Duration after which a stream counts as connected even without a message; a refused one ends sooner."""

OnLost = Callable[[StillhouseError, float], None]
"""Called with the error that ended a stream and the seconds until the next attempt."""


class Connection:
    """A channel to one service; a context manager that closes it."""

    service: str

    def __init__(
        self,
        target: str,
        *,
        tls: bool = False,
        tls_ca: Path | None = None,
        tls_cert: Path | None = None,
        tls_key: Path | None = None,
        tls_server_name: str | None = None,
        token: str | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> None:
        self.target = target
        self.timeout_s = timeout_s
        self.channel = connect(
            ChannelOptions(
                target=target,
                tls=tls,
                ca=tls_ca,
                cert=tls_cert,
                key=tls_key,
                server_name=tls_server_name,
                token=token,
                client_name=process_name("stillhouse-client"),
            )
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every call and closes the channel."""
        self.channel.close()

    def call(self, method: Callable[..., R], request: object, *, timeout_s: float | None = None) -> R:
        """Makes a unary call, or one that streams its request if `timeout_s` allows for it, and returns the response."""
        try:
            return method(request, timeout=timeout_s or self.timeout_s)
        except grpc.RpcError as error:
            raise self.error(error) from error

    def stream(self, method: Callable[..., Any], request: object) -> Iterator[Any]:
        """Yields the responses of a streaming call; closing the iterator cancels it."""
        call = method(request)
        try:
            yield from call
        except grpc.RpcError as error:
            raise self.error(error) from error
        finally:
            call.cancel()

    def error(self, error: grpc.RpcError) -> StillhouseError:
        """Turns a gRPC error into a sentence with a remedy."""
        return from_rpc_error(error, target=self.target, service=self.service)


def resumed(
    open_stream: Callable[[], Iterator[R]],
    *,
    on_lost: OnLost | None = None,
    patience_s: float = PATIENCE_S,
) -> Iterator[R]:
    """Yields the items of a stream and opens it again when it is lost.

    `open_stream` starts after the last item that was yielded. A stream that never sent one is not opened again. Raises
    errors that waiting cannot cure, and the last error if no service responds for `patience_s` seconds.
    """
    wait = BoundedWait(patience_s, on_pause=on_lost)
    has_answered = False
    while True:
        opened_s = time.monotonic()
        try:
            for item in open_stream():
                has_answered = True
                wait.answered()
                yield item
        except StillhouseError as error:
            if not (has_answered and error.retryable):
                raise
            if time.monotonic() - opened_s > CONNECTED_S:
                wait.answered()
            wait.pause(error)
        else:
            return
