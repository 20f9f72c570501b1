"""Asyncio channels for tests of the async servers, which add an identity to every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from stillhouse.protos.rpc import channel
from stillhouse.protos.rpc.channel import ChannelOptions
from stillhouse.protos.telemetry import tracing
from stillhouse.protos.telemetry.tracing import trace_metadata


def connect_async(options: ChannelOptions | str) -> grpc.aio.Channel:
    """An asyncio channel, as `connect`; call it from the loop that will use it."""
    options = channel._as_options(options)
    opened, metadata = channel.connect_async(options), channel.call_metadata(options)
    return MetadataChannel(opened, metadata) if metadata or tracing.enabled() else opened


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

    async def __aenter__(self) -> MetadataChannel:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._channel.close()
