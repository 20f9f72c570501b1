"""Base of server interceptors: wraps the behaviour of handlers, and turns undecodable requests into errors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from stillhouse.protos.errors import Reason, StillhouseError

Behaviour = Callable[[Any, Any], Any]
_INFRASTRUCTURE = "/grpc."
"""Prefix of health and reflection rpcs, which are public and expose no client's data."""


class RpcInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of a service's rpcs; health and reflection stay as they are."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of a call; its request is not yet read."""
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_INFRASTRUCTURE):
            return handler
        return self.wrap_handler(handler, handler_call_details)

    @abstractmethod
    def wrap_handler(self, handler: Any, details: grpc.HandlerCallDetails) -> Any:
        """Returns the handler to use instead of `handler`."""


def with_behaviour(handler: Any, change: Callable[[Behaviour], Behaviour]) -> Any:
    """A copy of the handler, its behaviour (request or requests, context) replaced by `change` of it."""
    kind = "_".join(
        "stream" if streams else "unary"
        for streams in (handler.request_streaming, handler.response_streaming)
    )
    return getattr(grpc, f"{kind}_rpc_method_handler")(
        change(getattr(handler, kind)),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )


async def respond(behaviour: Behaviour, request: Any, context: Any) -> Any:
    """The behaviour's response, or None once its stream of responses is written; closed if the client hangs up."""
    response = behaviour(request, context)
    if not hasattr(response, "__aiter__"):
        return await response
    async with aclosing(response) as responses:
        async for each in responses:
            await context.write(each)
    return None


def decode_leniently(handler: Any) -> Any:
    """A copy of the handler that reads undecodable bytes as `Undecodable`; gRPC itself would report UNKNOWN."""
    deserializer = handler.request_deserializer

    def read(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError as error:
            return Undecodable(str(error))

    return handler._replace(request_deserializer=read)


class Undecodable:
    """A request that could not be decoded."""

    def __init__(self, why: str) -> None:
        self.why = why


class _Checked:
    """A request stream that raises for an undecodable request."""

    def __init__(self, requests: AsyncIterable[Any]) -> None:
        self._requests = requests
        self._begun: AsyncIterator[Any] | None = None

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        if self._begun is None:
            self._begun = aiter(self._requests)
        return check_decoded(await anext(self._begun))


def check_decoded(request: Any) -> Any:
    """The request, or the request stream. Raises StillhouseError(INVALID_REQUEST) for an `Undecodable`."""
    if isinstance(request, Undecodable):
        raise StillhouseError(
            Reason.INVALID_REQUEST,
            f"The request cannot be decoded ({request.why}). Both sides need the same version of the contract.",
        )
    return _Checked(request) if isinstance(request, AsyncIterable) else request
