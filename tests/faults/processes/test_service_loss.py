"""A run service that is killed, repeated to and shouted at: each run is made once, is looked after, and ends once."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest

from stillhouse.client.api import Teacher
from stillhouse.protos.errors import Reason, from_rpc_error
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.protos.stillhouse.v1.teacher_pb2 import ScoreRequest
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from tests.conftest import Models
from tests.faults.history import Watcher, check_sequences
from tests.faults.world import World, get_run, insist, world
from tests.student_trainer.config.specs import cross_entropy_spec
from tests.student_trainer.runs.api.caller import stub_for, wait_ended, wait_step
from tests.student_trainer.train.runs import metric
from tests.support.networks.tcp_proxy import TcpProxy
from tests.support.programs import Program

SUBMITS, KILLS = 100, 4 if os.environ.get("LONG") else 2
ENDLESS = 1_000_000
NUM_SLOW, GROWTH_LIMIT_BYTES = 200, 64 * 2**20
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.mark.faults(row=9)
@pytest.mark.slow
def test_a_service_killed_under_a_hundred_submits_loses_and_doubles_none(
    models: Models, dataset_file: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    waiting = cross_entropy_spec(models.student, dataset_file, steps=5)
    with world(tmp_path, models.teacher) as here:
        here.start_service()
        with stub_for(here.service_target) as stub:
            endless = cross_entropy_spec(models.student, dataset_file, steps=ENDLESS)
            live = str(stub.CreateRun(pb.CreateRunRequest(spec=endless)).name)
            wait_step(stub, live, 3)
        pid = here.training_pid(live)
        watcher = Watcher(here.service_target, live)
        watcher.start()
        with ThreadPoolExecutor(8) as pool:
            requests = [str(uuid.uuid4()) for _ in range(SUBMITS)]
            submitted = [pool.submit(submit, here, waiting, each) for each in requests]
            for number in range(KILLS):
                while sum(each.done() for each in submitted) < (number + 1) * SUBMITS // (KILLS + 2):
                    time.sleep(0.01)
                here.kill_service()
                here.start_service()
            names = [each.result() for each in submitted]
        assert len(set(names)) == SUBMITS
        with stub_for(here.service_target) as stub:
            runs: list[Run] = []
            page = ""
            while not runs or page:
                listed = stub.ListRuns(pb.ListRunsRequest(page_size=50, page_token=page))
                runs += listed.runs
                page = listed.next_page_token
            queued = sorted(run.queue_position for run in runs if run.state == Run.STATE_PENDING)
            assert {run.name for run in runs} == {live, *names}
            assert queued == list(range(SUBMITS))
            assert submit(here, waiting, requests[0]) == names[0]
            run = get_run(here.service_target, live)
            assert (run.state, len(run.attempts)) == (Run.STATE_RUNNING, 1)
            assert here.training_pid(live) == pid, "the process was replaced"
            stub.StopRun(pb.StopRunRequest(name=live))
            run = wait_ended(stub, live)
            watcher.stop()
            assert run.state == Run.STATE_STOPPED
            (losses,) = stub.QueryMetrics(
                pb.QueryMetricsRequest(name=live, keys=["train/loss"], max_points=20_000)
            ).series
        assert list(losses.steps) == list(range(1, run.progress.step + 1))
        assert dict(zip(losses.steps, losses.values, strict=True)) == metric(here.run_dir(live), "train/loss")
        check_sequences(watcher.seen)
        assert watcher.seen[-1].run.state == Run.STATE_STOPPED
    record_property("figure", f"{SUBMITS} submits, {KILLS} kills, {watcher.num_breaks} breaks of the watch")


def submit(here: World, spec: pb.RunSpec, request_id: str) -> str:
    request = pb.CreateRunRequest(spec=spec, request_id=request_id)
    return str(insist(lambda stub: stub.CreateRun(request, timeout=5), here.service_target).name)


@pytest.fixture
def idle_service(trainer_service: Callable[..., Program]) -> Program:
    """A run service that has little to do."""
    return trainer_service("--stop-grace-s", "1")


@pytest.mark.faults(row=12)
def test_one_run_however_often_it_is_submitted_and_whose_reply_is_lost(
    idle_service: Program, models: Models, dataset_file: Path
) -> None:
    first = cross_entropy_spec(models.student, dataset_file, steps=1)
    second = cross_entropy_spec(models.student, dataset_file, steps=2)
    request_id = str(uuid.uuid4())
    with stub_for(idle_service.target) as stub, ThreadPoolExecutor(20) as pool:
        request = pb.CreateRunRequest(spec=first, request_id=request_id)
        made = list(pool.map(lambda _: stub.CreateRun(request, timeout=60).name, range(100)))
        assert len(set(made)) == 1
        with pytest.raises(grpc.RpcError) as refused:
            stub.CreateRun(pb.CreateRunRequest(spec=second, request_id=request_id))
        assert refused.value.code() is grpc.StatusCode.ALREADY_EXISTS
        again = pb.CreateRunRequest(spec=second, request_id=str(uuid.uuid4()))
        with TcpProxy(idle_service.target) as network:
            with stub_for(network.target) as far:
                far.ListRuns(pb.ListRunsRequest(), timeout=30)  # connected
                network.become("mute")
                with pytest.raises(grpc.RpcError) as lost:
                    far.CreateRun(again, timeout=2)
            assert lost.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            network.become("fine")
            with stub_for(network.target) as far:
                name = far.CreateRun(again, timeout=30).name
        assert {run.name for run in stub.ListRuns(pb.ListRunsRequest()).runs} == {made[0], name}


@pytest.mark.faults(row=13)
@pytest.mark.parametrize("which", ["teacher", "trainer"])
def test_noise_giants_and_dawdlers_take_no_service_down(
    which: str, hf_teacher: Program, idle_service: Program
) -> None:
    """Bytes that are no HTTP/2, a message above the limit, and connections that never come to the point."""
    program = hf_teacher if which == "teacher" else idle_service
    host, port = program.target.rsplit(":", 1)
    process = psutil.Process(program.pid)
    before = process.memory_info().rss
    for noise in (
        os.urandom(4096),
        b"GET / HTTP/1.1\r\n\r\n",
        PREFACE + os.urandom(4096),
        PREFACE + b"\xff" * 9,
    ):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(noise)
    slow = [socket.create_connection((host, int(port)), timeout=10) for _ in range(NUM_SLOW)]
    try:
        for number in range(len(PREFACE)):
            for connection in slow:
                connection.sendall(PREFACE[number : number + 1])
        with grpc.insecure_channel(program.target) as channel:
            giant: Callable[..., object] = channel.unary_unary("/stillhouse.v1.RunService/CreateRun")
            if which == "teacher":
                giant = channel.unary_unary("/stillhouse.v1.TeacherService/GetTeacherInfo")
            with pytest.raises(grpc.RpcError) as refused:
                giant(b"\x0a" + b"\x00" * (40 * 2**20), timeout=60)
            assert refused.value.code() in (
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                grpc.StatusCode.INVALID_ARGUMENT,
            )
        assert_answers(which, program)
        lying(which, program)
        assert_answers(which, program)
    finally:
        for connection in slow:
            connection.close()
    assert program.process.poll() is None
    assert process.memory_info().rss - before < GROWTH_LIMIT_BYTES


def assert_answers(which: str, program: Program) -> None:
    """A good call is answered while the bad ones last."""
    if which == "teacher":
        with Teacher(program.target) as teacher:
            (answer,) = teacher.score([("one", [5, 6, 7])], top_k=4)
            assert answer.error is None
    else:
        with stub_for(program.target) as stub:
            stub.ListRuns(pb.ListRunsRequest(), timeout=30)


def lying(which: str, program: Program) -> None:
    """A tensor that claims a billion numbers, a page that is asked to be as long."""
    with grpc.insecure_channel(program.target) as channel:
        if which == "teacher":
            request = ScoreRequest()
            request.config.top_k = 4
            claim = ScoreRequest()
            claim.sequence.token_ids.shape.append(10**9)
            claim.sequence.token_ids.data = b"\x00" * 8
            (response,) = TeacherServiceStub(channel).Score(iter([request, claim]), timeout=30)
            assert response.results[0].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
        else:
            from stillhouse.protos.stillhouse.v1.run_pb2_grpc import RunServiceStub

            with pytest.raises(grpc.RpcError) as refused:
                RunServiceStub(channel).ListRuns(pb.ListRunsRequest(page_size=-1), timeout=30)
            error = from_rpc_error(refused.value, target="", service="trainer")
            assert error.reason is Reason.INVALID_REQUEST
