"""Hostile requests and connections to both services: each gets a status that says whose fault it is, and nothing breaks or grows."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message

from stillhouse.protos.stillhouse.v1 import run_pb2, teacher_pb2
from stillhouse.teacher_service.models.fingerprint import adapter_fingerprint
from tests.fuzz.calls import Report, faults, resident_bytes, send
from tests.fuzz.conftest import CANARY, SEED, Target, scaled, show
from tests.fuzz.http2 import PREFACE, attack, flood
from tests.fuzz.rpcs import Case, Known, case, methods
from tests.student_trainer.runs.api.caller import stub_for
from tests.support.programs import Program
from tests.teacher_service.calls import Teacher

pytestmark = pytest.mark.model
MAX_GROWTH_BYTES = 64 * 2**20
WARM_UP = 0.15
"""Share of the cases before memory is measured: pools, caches and the largest batch fill up then."""
ANSWER_S = 0.02
"""Time that a hostile connection waits for an answer."""
SLOW_CONNECTIONS = 50
ALIVE_EVERY = 50
TEACHER = teacher_pb2.DESCRIPTOR.services_by_name["TeacherService"]
RUNS = run_pb2.DESCRIPTOR.services_by_name["RunService"]
SENTENCE = np.arange(2, 22, dtype=np.int32)


def cases(service: Any, known: Known, first: int, end: int) -> Iterator[Case]:
    """Cases of every rpc in turn: what one of them changes, the next one meets."""
    for number in range(first, end):
        every = methods(service)
        random.Random(f"{SEED}/{number}").shuffle(every)
        for method in every:
            yield case(method, f"{SEED}/{method.name}/{number}", known)


def call(target: Target, service: Any, count: int, look: Any) -> None:
    """`count` cases for each rpc; fails with every bug that they found."""
    report, warm = Report(), int(count * WARM_UP)

    address, known = target.program.target, target.known
    send(address, cases(service, known, 0, warm), report, look)
    before = resident_bytes(target.program.pid)
    send(address, cases(service, known, warm, count), report, look)
    growth = resident_bytes(target.program.pid) - before
    lines = [*report.lines(), f"resident memory {before / 2**20:.0f} MiB, grown by {growth / 2**20:.1f} MiB"]
    show(service.full_name, iter(lines))
    assert not report.bugs, "\n".join(report.bugs)
    assert target.program.process.poll() is None, target.program.log()
    assert faults(target.program.log_path) == []
    assert growth < MAX_GROWTH_BYTES, "\n".join(lines)


@pytest.mark.faults(row=13)
def test_the_teacher_service_survives_hostile_requests(teacher: Target) -> None:
    known = Teacher(teacher.program.target)
    before = known.score_one(SENTENCE, top_k=8)
    forbidden = adapter_fingerprint(Path(teacher.known.words[1]))

    def look(_case: Case, answer: Message) -> str | None:
        if isinstance(answer, teacher_pb2.LoadAdapterResponse) and answer.adapter.fingerprint == forbidden:
            return "an adapter outside of the roots was loaded"
        return None

    call(teacher, TEACHER, scaled(60, 6000), look)
    after = known.score_one(SENTENCE, top_k=8)
    np.testing.assert_array_equal(before.logprobs, after.logprobs)
    np.testing.assert_array_equal(before.token_ids, after.token_ids)
    known.close()


@pytest.mark.faults(row=13)
def test_the_run_service_survives_hostile_requests(trainer: Target) -> None:
    known = trainer.known

    def look(_case: Case, answer: Message) -> str | None:
        if isinstance(answer, run_pb2.Run) and answer.name and answer.name not in known.names:
            known.names.append(answer.name)
            del known.names[1:-8]  # the first, which is live, and the newest
        if isinstance(answer, run_pb2.DownloadArtifactResponse) and CANARY in answer.data:
            return "a file outside of the run was sent"
        return None

    call(trainer, RUNS, scaled(60, 4000), look)
    with stub_for(trainer.program.target) as stub:
        live = stub.GetRun(run_pb2.GetRunRequest(name=known.names[0]))
        assert live.state in (run_pb2.Run.STATE_RUNNING, run_pb2.Run.STATE_STOPPING)
        request = run_pb2.CreateRunRequest(spec=known.spec, validate_only=True)
        assert stub.CreateRun(request).effective_spec.optimizer.max_steps == 1_000_000


def rpc_paths(service: Any) -> list[str]:
    return [f"/{service.full_name}/{method.name}" for method in methods(service)]


def speak(program: Program, data: bytes) -> None:
    """Sends it, hears what comes for a moment, and hangs up; being cut off is fine."""
    host, port = program.target.rsplit(":", 1)
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        try:
            connection.sendall(data)
            connection.settimeout(ANSWER_S)
            while connection.recv(65536):
                pass
        except (TimeoutError, ConnectionError):
            pass


@pytest.fixture
def slow_connections() -> Iterator[list[socket.socket]]:
    """Open connections that are closed in the end."""
    opened: list[socket.socket] = []
    yield opened
    for each in opened:
        each.close()


def rng_of(title: str, number: int) -> random.Random:
    return random.Random(f"{SEED}/{title}/{number}")


def assault(program: Program, paths: list[str], title: str, count: int, alive: Callable[[], None]) -> None:
    """`count` hostile connections, after some to warm up; `alive` is asked in between."""
    for number in range(
        scaled(20, 300)
    ):  # what takes most memory: the allocator keeps the most that it ever had
        speak(program, flood(rng_of(title, -number).choice(paths), random.Random(number)))
    before = 0
    for number in range(-count // 10, count):
        if number == 0:
            before = resident_bytes(program.pid)
        rng = rng_of(title, number)
        speak(program, attack(rng.choice(paths), rng))
        if number % ALIVE_EVERY == 0:
            alive()
    alive()
    growth = resident_bytes(program.pid) - before
    show(title, iter([f"{count} connections; resident memory grown by {growth / 2**20:.1f} MiB"]))
    assert program.process.poll() is None, program.log()
    assert faults(program.log_path) == []
    assert growth < MAX_GROWTH_BYTES


def dribble(program: Program, opened: list[socket.socket]) -> None:
    """Connections that begin a preface and never come to its end."""
    host, port = program.target.rsplit(":", 1)
    for number in range(SLOW_CONNECTIONS):
        connection = socket.create_connection((host, int(port)), timeout=60)
        opened.append(connection)
        connection.sendall(PREFACE[: 1 + number % len(PREFACE)])


@pytest.mark.faults(row=13)
def test_the_teacher_service_survives_hostile_connections(
    teacher: Target, slow_connections: list[socket.socket]
) -> None:
    dribble(teacher.program, slow_connections)

    def alive() -> None:
        began_s = time.monotonic()
        caller = Teacher(teacher.program.target)
        caller.score_one([2, 3, 4], top_k=2)
        caller.close()
        assert time.monotonic() - began_s < 60

    assault(teacher.program, rpc_paths(TEACHER), "connections to the teacher", scaled(60, 2000), alive)


@pytest.mark.faults(row=13)
def test_the_run_service_survives_hostile_connections(
    trainer: Target, slow_connections: list[socket.socket]
) -> None:
    dribble(trainer.program, slow_connections)

    def alive() -> None:
        with stub_for(trainer.program.target) as stub:
            assert stub.GetRun(run_pb2.GetRunRequest(name=trainer.known.names[0]), timeout=20).name

    assault(trainer.program, rpc_paths(RUNS), "connections to the run service", scaled(60, 2000), alive)
