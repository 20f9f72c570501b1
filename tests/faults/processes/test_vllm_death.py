"""vLLM's engine runs in a process of its own: when that dies, its front says so at once and ends."""

from __future__ import annotations

import importlib.util
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stillhouse.client.api import Teacher
from tests.conftest import Models
from tests.support.processes import no_process_left
from tests.support.programs import start_teacher

NOT_SERVING_WITHIN_S, ENDS_WITHIN_S = 2.0, 20.0


@pytest.mark.faults(row=2)
@pytest.mark.slow
def test_a_teacher_whose_engine_process_is_killed_stops_serving_and_ends(
    models: Models, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    with (
        no_process_left() as mark,
        start_teacher(
            models.teacher,
            engine="vllm",
            directory=tmp_path,
            options=["--dtype", "float32", "--metrics-port", "0"],
            environment=mark,
        ) as program,
        grpc.insecure_channel(program.target) as channel,
    ):
        with Teacher(program.target) as teacher:
            assert [answer.error for answer in teacher.score([("one", [5, 6, 7])], top_k=4)] == [None]
        health = health_pb2_grpc.HealthStub(channel)
        assert status(health) == health_pb2.HealthCheckResponse.SERVING
        children = psutil.Process(program.pid).children(recursive=True)
        engine = max(children, key=lambda process: process.memory_info().rss)
        os.kill(engine.pid, signal.SIGKILL)
        began = time.monotonic()
        while status(health) == health_pb2.HealthCheckResponse.SERVING:
            assert time.monotonic() - began < NOT_SERVING_WITHIN_S, "it still says that it serves"
            time.sleep(0.02)
        noticed_s = time.monotonic() - began
        assert program.process.wait(ENDS_WITHIN_S) not in (0, None)
        ended_s = time.monotonic() - began
    record_property("figure", f"not serving after {noticed_s:.2f} s, ended after {ended_s:.1f} s")


def status(health: health_pb2_grpc.HealthStub) -> int | None:
    """Status from the health service; None once nobody answers."""
    try:
        return int(health.Check(health_pb2.HealthCheckRequest(), timeout=2).status)
    except grpc.RpcError:
        return None
