"""Adds metadata to every call of a channel: client name, token and trace."""

from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from stillhouse.protos.telemetry.tracing import trace_metadata


class MetadataInterceptor(
    grpc.UnaryUnaryClientInterceptor,
    grpc.UnaryStreamClientInterceptor,
    grpc.StreamUnaryClientInterceptor,
    grpc.StreamStreamClientInterceptor,
):
    """Adds metadata to every call of a blocking channel."""

    def __init__(self, metadata: Sequence[tuple[str, str]]) -> None:
        self._metadata = tuple(metadata)

    def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return continuation(self._details(client_call_details), request)

    intercept_unary_stream = intercept_unary_unary
    intercept_stream_unary = intercept_unary_unary  # type: ignore[assignment]
    intercept_stream_stream = intercept_unary_unary  # type: ignore[assignment]

    def _details(self, details: Any) -> grpc.ClientCallDetails:
        own = _Details()
        own.method, own.timeout, own.credentials = details.method, details.timeout, details.credentials
        own.wait_for_ready, own.compression = details.wait_for_ready, details.compression
        own.metadata = (*(details.metadata or ()), *self._metadata, *trace_metadata())
        return own


class _Details(grpc.ClientCallDetails):
    """Call details with added metadata."""


class MetadataChannel(grpc.aio.Channel):
    """An async channel that adds metadata to every call; unlike interceptors it returns gRPC's own call objects."""

    def __init__(self, channel: grpc.aio.Channel, metadata: Sequence[tuple[str, str]]) -> None:
        self._channel, self._metadata = channel, tuple(metadata)

    def _wrap(self, multicallable: Callable[..., Any]) -> Any:
        def call(*args: Any, metadata: Any = None, **kwargs: Any) -> Any:
            return multicallable(
                *args, metadata=(*(metadata or ()), *self._metadata, *trace_metadata()), **kwargs
            )

        return call

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrap(self._channel.unary_unary(*args, **kwargs))

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrap(self._channel.unary_stream(*args, **kwargs))

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrap(self._channel.stream_unary(*args, **kwargs))

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrap(self._channel.stream_stream(*args, **kwargs))

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    async def __aenter__(self) -> "MetadataChannel":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._channel.close()
