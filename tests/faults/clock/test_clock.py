"""The clock of the day jumps under every program, and a process that was long asleep wakes up: neither spoils a run."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from google.protobuf import json_format

from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.student_trainer.run_dir import EXIT_FAILED
from stillhouse.student_trainer.train.process import failpoints
from tests.conftest import Models
from tests.faults.world import World
from tests.student_trainer.runs.api.caller import stub_for, wait_ended, wait_step
from tests.student_trainer.train.runs import assert_same_end, finish_here, make_run, metric, spec_of, start
from tests.support.privileges import preloaded
from tests.support.processes import no_process_left
from tests.support.programs import Program
from tests.support.runs import wait_until

STEPS = 60
DAY_S = 86_400


@pytest.fixture
def jumping(tmp_path: Path) -> Iterator[World]:
    """A world whose clock jumps once the file `jump` is there."""
    library = preloaded(Path(__file__).with_name("clock_jump.c"), tmp_path)
    with no_process_left() as mark:
        clock = {**library, "CLOCK_JUMP_FILE": str(tmp_path / "jump"), "CLOCK_JUMP_S": ""}
        made = World(root=tmp_path, teacher_model=tmp_path, environment={**mark, **clock})
        try:
            yield made
        finally:
            made.close()


def spec(models: Models, data: Path, target: str) -> dict[str, Any]:
    return spec_of(
        models.student,
        data,
        target,
        data={"eval_fraction": 0},
        optimizer={"max_steps": STEPS, "grad_accum_steps": 1},
        checkpoint={"every_steps": 5},
    )


@pytest.mark.faults(row=21)
@pytest.mark.slow
@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_a_clock_that_jumps_by_a_day_under_all_programs_changes_nothing(
    jump_s: int, jumping: World, models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    jumping.environment = {**jumping.environment, "CLOCK_JUMP_S": str(jump_s)}
    jumping.start_teacher(models.teacher)
    jumping.start_service()
    message = json_format.ParseDict(spec(models, dataset_file, jumping.teacher_target), pb.RunSpec())
    with stub_for(jumping.service_target) as stub:
        disturbed = stub.CreateRun(pb.CreateRunRequest(spec=message)).name
        wait_step(stub, disturbed, 2)
        (tmp_path / "jump").touch()
        calm = stub.CreateRun(pb.CreateRunRequest(spec=message)).name
        for name in (disturbed, calm):
            run = wait_ended(stub, name)
            assert run.state == Run.STATE_COMPLETED, run.error.message
            assert len(run.attempts) == 1
    first, second = (jumping.run_dir(name) for name in (disturbed, calm))
    assert_same_end(first, second)


@pytest.mark.faults(row=21)
def test_a_process_that_slept_through_its_replacement_changes_nothing_when_it_wakes(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    """Without the lock, as on a file system of two hosts: the number of the attempt alone keeps it off."""
    run_dir = make_run(tmp_path, "slept", spec(models, dataset_file, hf_teacher.target))
    with no_process_left() as mark:
        sleeper = start(run_dir, 1, {**mark, failpoints.VARIABLE: "checkpoint.after_rename:2:stop"})
        process = psutil.Process(sleeper.pid)
        wait_until(lambda: process.status() == psutil.STATUS_STOPPED or sleeper.poll() is not None, "sleep")
        assert sleeper.poll() is None
        assert len(run_dir.checkpoints()) >= 2
        try:
            run_dir.lock_path.unlink()
            assert finish_here(run_dir, 2) == 0
            left = {path: path.read_bytes() for path in files_of(run_dir.path)}
        finally:
            sleeper.send_signal(signal.SIGCONT)
        assert sleeper.wait(60) not in (0, EXIT_FAILED)
    assert {path: path.read_bytes() for path in files_of(run_dir.path)} == left
    assert sorted(metric(run_dir, "train/loss")) == list(range(1, STEPS + 1))


def files_of(root: Path) -> list[Path]:
    """Files of a run; a log and a drawing of curves may grow."""
    folders = ("attempts", "tensorboard")
    found = (path for path in root.rglob("*") if path.is_file() and path.name != "heartbeat")
    return sorted(path for path in found if path.relative_to(root).parts[0] not in folders)
