"""Life of a teacher process: one that cannot start says why, a running one drains, a dead one stops serving."""

from __future__ import annotations

import asyncio
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from stillhouse.protos.errors import Reason, StillhouseError, from_rpc_error
from stillhouse.protos.stillhouse.v1 import teacher_pb2, teacher_pb2_grpc
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engines.hf.engine import HfEngine
from stillhouse.teacher_service.lifecycle import SERVICE, _TeacherProcess
from tests.conftest import Models
from tests.support.networks.async_channel import connect_async
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_teacher
from tests.teacher_service.calls import Teacher, distribution_config, prompt, random_ids, sequence

pytestmark = pytest.mark.model


@pytest.fixture
def program(models: Models, tmp_path: Path) -> Iterator[Program]:
    options = ["--threads", "1", "--shutdown-grace-s", "20"]
    with (
        no_process_left() as mark,
        start_teacher(
            models.teacher, engine="hf", directory=tmp_path, options=options, environment=mark
        ) as started,
    ):
        yield started


def test_a_teacher_keeps_what_transformers_reads(models: Models, tmp_path: Path) -> None:
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    with start_teacher(models.teacher, engine="hf", directory=tmp_path, environment=environment):
        assert len(list((tmp_path / "cache" / "stillhouse" / "scans").iterdir())) == 2


def start_with(*options: str) -> tuple[int, str]:
    """Exit code and stderr of a teacher with these options."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "stillhouse.teacher_service",
            "--engine",
            "hf",
            "--listen",
            "127.0.0.1:0",
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model", "/no/such/model"], "/no/such/model"),
        (["--model", "."], "config.json"),
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--model", "MODEL", "--max-top-k", "999"], "--max-top-k"),
        (["--model", "MODEL", "--listen", "0.0.0.0:0"], "--insecure"),
        (["--model", "MODEL", "--tls-cert", "x.pem"], "--tls-key"),
        (["--model", "MODEL", "--max-sequence-tokens", "4096"], "512"),
        (["--model", "MODEL", "--quantization", "awq"], "does require the model to be pre-quantized"),
        (["--model", "MODEL", "--quantization", "nonsense"], "to transformers"),
        (["--model", "MODEL", "--adapter", "a=/no/such/adapter"], "/no/such/adapter"),
    ],
)
def test_a_failed_start_is_one_sentence_and_exit_code_2(
    models: Models, options: list[str], named: str
) -> None:
    code, said = start_with(*[str(models.teacher) if option == "MODEL" else option for option in options])
    assert code == 2
    last = said.strip().splitlines()[-1]
    assert last.startswith("stillhouse-teacher: ")
    assert named in last
    assert "Traceback" not in said


@pytest.mark.faults(row=22)
def test_sigterm_lets_running_calls_finish_and_refuses_others(program: Program) -> None:
    teacher = Teacher(program.target)
    writing = iter(
        teacher.stub.Generate(
            teacher_pb2.GenerateRequest(
                prompts=[prompt(random_ids(4))] * 4,
                sampling=teacher_pb2.SamplingParams(max_new_tokens=500, seed=1),
                # More than the transport holds: the call runs until its responses are read.
                distributions=distribution_config(256),
            )
        )
    )
    chunks = list(next(writing).chunks)
    requests: queue.Queue[teacher_pb2.ScoreRequest] = queue.Queue()
    requests.put(teacher_pb2.ScoreRequest(config=distribution_config()))
    requests.put(teacher_pb2.ScoreRequest(sequence=sequence(random_ids(9))))
    scoring = iter(teacher.stub.Score(iter(requests.get, None)))
    assert next(scoring).results[0].last
    program.process.send_signal(signal.SIGTERM)
    # The open stream is no longer read, and reports the caller's position.
    with pytest.raises(grpc.RpcError) as ended:
        next(scoring)
    assert from_rpc_error(ended.value, target="", service="teacher").reason == Reason.DRAINING
    with pytest.raises(grpc.RpcError) as refused:
        teacher.stub.GetTokenizer(teacher_pb2.GetTokenizerRequest()).__next__()
    error = from_rpc_error(refused.value, target="", service="teacher")
    assert error.reason == Reason.DRAINING
    assert error.retry_after_s is not None
    chunks += [chunk for response in writing for chunk in response.chunks]
    assert sum(chunk.finish_reason != 0 for chunk in chunks) == 4
    assert program.process.wait(20) == 0
    assert '"drained"' in program.log()
    assert '"sequences_received": 1' in program.log()
    teacher.close()


def test_a_teacher_that_loads_can_be_stopped(models: Models, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "stillhouse.teacher_service",
        "--engine",
        "hf",
        "--model",
        str(models.teacher),
    ]
    address_file = tmp_path / "address"
    with no_process_left() as mark:
        loading = subprocess.Popen(
            [*command, "--listen", "127.0.0.1:0", "--address-file", str(address_file)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **mark},
        )
        assert loading.stderr is not None
        assert '"listening"' in loading.stderr.readline()
        loading.send_signal(signal.SIGTERM)
        said = loading.communicate(timeout=100)[1]
    assert loading.returncode == 0
    assert "stopped while loading" in said
    assert not address_file.exists()


@pytest.mark.faults(row=22)
def test_a_second_signal_does_not_wait_for_calls(program: Program) -> None:
    teacher = Teacher(program.target)
    writing = teacher.stub.Generate(
        teacher_pb2.GenerateRequest(
            prompts=[prompt(random_ids(4))] * 64,
            num_samples=64,
            sampling=teacher_pb2.SamplingParams(max_new_tokens=500),
        )
    )
    next(iter(writing))
    program.process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        program.process.wait(1)
    program.process.send_signal(signal.SIGTERM)
    assert program.process.wait(15) == 0, "it waits for its calls, for 20 s"
    teacher.close()


@pytest.mark.faults(row=2)
async def test_a_teacher_that_loads_refuses_and_one_whose_engine_dies_stops_serving(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address_file = tmp_path / "address"
    socket = f"unix:{tmp_path / 'socket'}"
    config = TeacherConfig(
        model=str(models.teacher), threads=1, listen=socket, address_file=address_file, shutdown_grace_s=5
    )
    load, may_load = HfEngine._load, threading.Event()

    def gated(config: TeacherConfig) -> HfEngine:
        assert may_load.wait(60)
        return load(config)

    monkeypatch.setattr(HfEngine, "_load", gated)
    teacher = _TeacherProcess(config)
    living = asyncio.create_task(teacher.live())
    while not (tmp_path / "socket").exists():  # noqa: ASYNC110 - a file has no event
        await asyncio.sleep(0.001)
    async with connect_async(socket) as channel:
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        await channel.channel_ready()
        with pytest.raises(grpc.aio.AioRpcError) as loading:
            await anext(aiter(stub.GetTokenizer(teacher_pb2.GetTokenizerRequest())))
        assert from_rpc_error(loading.value, target="", service="teacher").reason == Reason.TEACHER_LOADING
        states = []
        async for state in watch(health):
            if state.status != health_pb2.HealthCheckResponse.UNKNOWN:
                states.append(state.status)
                may_load.set()
        assert states == [
            health_pb2.HealthCheckResponse.NOT_SERVING,
            health_pb2.HealthCheckResponse.SERVING,
        ]
        assert address_file.read_text() == socket
        assert (await stub.GetTeacherInfo(teacher_pb2.GetTeacherInfoRequest())).vocab_size == 392
        killing = asyncio.create_task(teacher._engine._worker.call(die))  # type: ignore[union-attr]
        async with asyncio.timeout(5):
            with pytest.raises(StillhouseError) as died:
                await living
    assert died.value.reason == Reason.PROCESS_DIED
    await asyncio.gather(killing, return_exceptions=True)


async def watch(
    health: health_pb2_grpc.HealthStub,
) -> AsyncIterator[health_pb2.HealthCheckResponse]:
    """Health states until SERVING."""
    async for state in health.Watch(health_pb2.HealthCheckRequest(service=SERVICE)):
        yield state
        if state.status == health_pb2.HealthCheckResponse.SERVING:
            return


def die() -> None:
    """Ends the engine's thread as no request can."""
    raise SystemExit
