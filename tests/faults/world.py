"""A small world to disturb: a teacher and a run service at addresses that outlive their processes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc

from stillhouse.protos.rpc.channel import connect
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.protos.stillhouse.v1.run_pb2_grpc import RunServiceStub
from stillhouse.student_trainer.run_dir import RunDir
from tests.support.processes import kill, no_process_left
from tests.support.programs import Program, start_teacher, start_trainer
from tests.support.runs import PATIENCE_S

T = TypeVar("T")
LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED)
"""Codes that a caller gets when the reply, or the service, is gone."""


@dataclass(kw_only=True)
class World:
    """Starts, kills and starts again; whatever it started ends with it."""

    root: Path
    teacher_model: Path
    environment: Mapping[str, str]
    service_options: Sequence[str] = ("--cpu-slots", "1", "--stop-grace-s", "20")
    teacher_options: Sequence[str] = ("--dtype", "float32", "--threads", "1")
    teacher: Program | None = None
    second_teacher: Program | None = None
    service: Program | None = None
    num_started: int = field(default=0)

    @property
    def teacher_target(self) -> str:
        return f"unix:{self.root}/t.sock"

    @property
    def second_teacher_target(self) -> str:
        return f"unix:{self.root}/t2.sock"

    @property
    def service_target(self) -> str:
        return f"unix:{self.root}/s.sock"

    @property
    def data_dir(self) -> Path:
        return self.root / "data"

    def run_dir(self, name: str) -> RunDir:
        """Directory of the run `runs/<id>`."""
        return RunDir(self.data_dir / name)

    def start_teacher(self, model: Path | None = None, *options: str) -> Program:
        """A teacher at the address of all teachers of this world, while no other one lives."""
        self.teacher = self._start_teacher(self.teacher_target, model or self.teacher_model, *options)
        return self.teacher

    def start_second_teacher(self) -> Program:
        """Another service of the same model, at an address of its own."""
        self.second_teacher = self._start_teacher(self.second_teacher_target, self.teacher_model)
        return self.second_teacher

    def _start_teacher(self, target: str, model: Path, *options: str) -> Program:
        self.num_started += 1
        return start_teacher(
            model,
            engine="hf",
            directory=self.root / f"teacher-{self.num_started}",
            options=[*self.teacher_options, *options, "--listen", target, "--metrics-port", "0"],
            environment=self.environment,
        )

    def start_service(self) -> Program:
        """The run service, on the data directory that it always had."""
        self.num_started += 1
        self.service = start_trainer(
            self.data_dir,
            directory=self.root / f"service-{self.num_started}",
            options=[*self.service_options, "--listen", self.service_target, "--metrics-port", "0"],
            environment=self.environment,
        )
        return self.service

    def kill_teacher(self) -> None:
        """SIGKILL for the teacher, which somebody starts again."""
        assert self.teacher is not None
        self.teacher.kill()

    def kill_service(self) -> None:
        """SIGKILL for the service alone: training processes live on."""
        assert self.service is not None
        self.service.process.kill()
        self.service.process.wait()

    def training_pid(self, name: str) -> int | None:
        """The live training process of a run, if it has one."""
        record = self.run_dir(name).process()
        return record.pid if record is not None and record.alive else None

    def close(self) -> None:
        """Ends everything, training processes included."""
        for program in (self.service, self.teacher, self.second_teacher):
            if program is not None:
                program.kill()
        for path in self.data_dir.glob("runs/*/process.json"):
            record = RunDir(path.parent).process()
            if record is not None and record.alive:
                kill(record.pid)


@contextlib.contextmanager
def world(root: Path, teacher_model: Path, **changes: Any) -> Iterator[World]:
    """A world in which nothing runs; nothing of it outlives the block."""
    with no_process_left() as mark:
        made = World(root=root, teacher_model=teacher_model, environment=mark, **changes)
        try:
            yield made
        finally:
            made.close()


def insist(call: Callable[[RunServiceStub], T], target: str, *, patience_s: float = PATIENCE_S) -> T:
    """Calls the service again while it is away, and returns its answer; only for calls that may be repeated."""
    deadline = time.monotonic() + patience_s
    while True:
        with connect(target) as channel:
            try:
                return call(RunServiceStub(channel))
            except grpc.RpcError as error:
                if error.code() not in LOST or time.monotonic() > deadline:
                    raise
        time.sleep(0.1)


def get_run(target: str, name: str) -> Run:
    """The run as the service knows it."""
    return insist(lambda stub: stub.GetRun(pb.GetRunRequest(name=name), timeout=30), target)
