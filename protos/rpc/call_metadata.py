"""Adds metadata to every call of a channel: client name, token and trace."""

from collections.abc import Sequence
from typing import Any

import grpc

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
