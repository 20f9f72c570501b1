"""Client and server spans of a call form one trace with a collector configured; otherwise no metadata is sent."""

import asyncio

import pytest

from stillhouse.protos.rpc.channel import connect
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.telemetry import tracing
from tests.protos.rpc.serving import Told, serving, stub_of
from tests.support.networks.async_channel import connect_async

INFO = teacher_pb2.GetTeacherInfoRequest()


async def test_the_server_span_is_a_child_of_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.sdk", reason="opentelemetry is not installed")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    monkeypatch.setenv(tracing.ENDPOINT_VARIABLE, "http://127.0.0.1:1")
    servicer = Told()
    async with serving(servicer) as address:

        def blocking() -> None:
            with connect(address) as channel:
                stub_of(channel).GetTeacherInfo(INFO, timeout=60)

        with tracing.process_span("train", run="a"):
            async with connect_async(address) as channel:
                await stub_of(channel).GetTeacherInfo(INFO, timeout=60)
            # A thread has no span.
            await asyncio.get_running_loop().run_in_executor(None, blocking)
        assert "traceparent" in servicer.metadata
    spans = {span.name: span for span in exporter.get_finished_spans()}
    answers = [span for span in exporter.get_finished_spans() if span.name.endswith("GetTeacherInfo")]
    assert len(answers) == 2
    for span in answers:
        assert span.parent is not None
        assert span.parent.span_id == spans["train"].context.span_id
        assert span.context.trace_id == spans["train"].context.trace_id
        assert span.attributes is not None
        assert span.attributes["stillhouse.outcome"] == "OK"


async def test_no_trace_metadata_is_sent_without_a_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tracing.ENDPOINT_VARIABLE, raising=False)
    assert not tracing.configure_tracing("test")
    servicer = Told()
    async with serving(servicer) as address, connect_async(address) as channel:
        with tracing.process_span("train"):
            await stub_of(channel).GetTeacherInfo(INFO, timeout=60)
    assert "traceparent" not in servicer.metadata
