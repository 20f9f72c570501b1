"""Traces across the wire with OpenTelemetry's API, where the extra [otel] is installed and an exporter is configured; else nothing.

`OTEL_EXPORTER_OTLP_ENDPOINT` switches it on; OpenTelemetry's other variables are heeded as they are.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import structlog

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
_KEYS = frozenset({"traceparent", "tracestate"})
_SDK = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.grpc")

_process_carrier: dict[str, str] = {}
"""Parent of calls made outside of any span, such as those of threads."""

log = structlog.get_logger(__name__)


class Span:
    """A span of a call; this one is a no-op."""

    def set_outcome(self, outcome: str) -> None:
        """Records the outcome of the call: OK or a reason."""


class _RealSpan(Span):
    def __init__(self, span: Any) -> None:
        self._span = span

    def set_outcome(self, outcome: str) -> None:
        self._span.set_attribute("stillhouse.outcome", outcome)


def configure_tracing(service: str) -> bool:
    """Exports spans to the collector that the environment names; True if it does."""
    if not os.environ.get(ENDPOINT_VARIABLE):
        return False
    if not all(_installed(name) for name in _SDK):
        log.warning(
            "no traces", why=f"{ENDPOINT_VARIABLE} is set, but the extra stillhouse[otel] is not installed"
        )
        return False
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    return True


@contextmanager
def server_span(method: str, context: Any) -> Iterator[Span]:
    """A span for handling a call, child of the caller's span if its metadata names one."""
    if not enabled():
        yield Span()
        return
    from opentelemetry import propagate, trace

    metadata = {key: value for key, value in context.invocation_metadata() or () if key in _KEYS}
    with trace.get_tracer("stillhouse").start_as_current_span(
        method.lstrip("/"),
        context=propagate.extract(metadata),
        kind=trace.SpanKind.SERVER,
        attributes={"rpc.system": "grpc", "rpc.method": method.rpartition("/")[2]},
    ) as span:
        yield _RealSpan(span)


@contextmanager
def process_span(name: str, **attributes: str | int | float) -> Iterator[None]:
    """A span for this process: calls of all its threads become its children, unless they have a nearer span."""
    if not enabled():
        yield
        return
    from opentelemetry import trace

    with trace.get_tracer("stillhouse").start_as_current_span(name, attributes=attributes):
        _process_carrier.update(_carrier())
        try:
            yield
        finally:
            _process_carrier.clear()


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Metadata that makes the server's span a child of the current one."""
    if not enabled():
        return ()
    return tuple((_carrier() or _process_carrier).items())


def _carrier() -> dict[str, str]:
    from opentelemetry import propagate

    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return {key: value for key, value in carrier.items() if key in _KEYS}


def enabled() -> bool:
    """True if tracing is on in this process."""
    # The environment alone is not enough: a program may set up its own tracer.
    return bool(os.environ.get(ENDPOINT_VARIABLE)) and _installed("opentelemetry.sdk")


@functools.cache
def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False
