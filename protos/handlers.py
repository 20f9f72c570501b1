"""A gRPC handler with another behaviour: the rest of it, its kind and its serialisers, stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

Behaviour = Callable[[Any, Any], Any]


def with_behaviour(handler: Any, change: Callable[[Behaviour], Behaviour]) -> Any:
    """The same handler, whose behaviour (request or requests, context) is what `change` makes of the present one."""
    kind = "_".join(
        "stream" if streams else "unary"
        for streams in (handler.request_streaming, handler.response_streaming)
    )
    return getattr(grpc, f"{kind}_rpc_method_handler")(
        change(getattr(handler, kind)),
        request_deserializer=handler.request_deserializer,
        response_serializer=handler.response_serializer,
    )
