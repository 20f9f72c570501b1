"""A channel to one service: every call's error becomes a StillhouseError, and lost streams are taken up again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc

from stillhouse.protos.errors import StillhouseError, from_rpc_error
from stillhouse.protos.rpc.channel import ChannelOptions, connect, process_name

R = TypeVar("R")

CALL_TIMEOUT_S = 60.0
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 15.0
PATIENCE_S = 600.0
"""Time without a service after which a lost stream is given up."""
CONNECTED_S = 30.0
"""A stream that lasted so long was connected, also if it had nothing to say; one that is refused ends sooner."""

OnLost = Callable[[StillhouseError, float], None]
"""Told why a stream was lost, and how many seconds later it is tried again."""


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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends every call and closes the channel."""
        self.channel.close()

    def call(self, method: Callable[..., R], request: object, *, timeout_s: float | None = None) -> R:
        """The answer of a unary call, or of one that streams its request if `timeout_s` allows for it."""
        try:
            return method(request, timeout=timeout_s or self.timeout_s)
        except grpc.RpcError as error:
            raise self.error(error) from error

    def stream(self, method: Callable[..., Any], request: object) -> Iterator[Any]:
        """The answers of a streaming call; closing the iterator cancels it."""
        call = method(request)
        try:
            yield from call
        except grpc.RpcError as error:
            raise self.error(error) from error
        finally:
            call.cancel()

    def error(self, error: grpc.RpcError) -> StillhouseError:
        """What went wrong, as a sentence with a remedy."""
        return from_rpc_error(error, target=self.target, service=self.service)


class Patience:
    """Pauses between attempts: they double, with jitter, and end after PATIENCE_S without an answer."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        self.answered()

    def answered(self) -> None:
        """Starts again from the shortest pause."""
        self._pause_s = FIRST_PAUSE_S
        self._since = time.monotonic()

    def wait(self, error: StillhouseError, on_lost: OnLost | None) -> None:
        """Sleeps before the next attempt. Raises `error` if nobody answered for too long."""
        if time.monotonic() - self._since > self._patience_s:
            raise error
        pause_s = max(self._pause_s, min(error.retry_after_s or 0.0, LONGEST_PAUSE_S))
        pause_s *= random.uniform(0.5, 1.0)  # noqa: S311 (jitter)
        if on_lost is not None:
            on_lost(error, pause_s)
        time.sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)


def resumed(
    open_stream: Callable[[], Iterator[R]],
    *,
    on_lost: OnLost | None = None,
    patience_s: float = PATIENCE_S,
) -> Iterator[R]:
    """The items of a stream that is opened again when it is lost.

    `open_stream` starts after the last item that was given out. A stream that never answered is not opened again.
    Raises what cannot be helped by waiting, and the last error if no service is there for `patience_s` seconds.
    """
    patience = Patience(patience_s)
    has_answered = False
    while True:
        opened_s = time.monotonic()
        try:
            for item in open_stream():
                has_answered = True
                patience.answered()
                yield item
        except StillhouseError as error:
            if not (has_answered and error.retryable):
                raise
            if time.monotonic() - opened_s > CONNECTED_S:
                patience.answered()
            patience.wait(error, on_lost)
        else:
            return
