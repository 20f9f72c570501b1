"""Kill and resume: an interrupted run ends in the same weights, bit for bit, as one that was never touched."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from stillhouse.student_trainer.train.process import failpoints
from tests.conftest import Models
from tests.student_trainer.train.runs import (
    assert_same_end,
    events,
    failure,
    finish,
    finish_here,
    make_run,
    metric,
    spec_of,
    start,
    waits,
)
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_teacher

STEPS = 12
DEADLINE_S = 100.0


def _spec(models: Models, data: Path, target: str) -> dict[str, Any]:
    """With dropout, so that the random generators matter, and with an order that crosses an epoch."""
    student = {"model": str(models.student), "lora": {"rank": 4, "dropout": 0.2}, "output": "merged"}
    return spec_of(
        models.student,
        data,
        target,
        student=student,
        optimizer={"max_steps": STEPS},
        checkpoint={"every_steps": 3},
    )


@pytest.fixture
def spec(models: Models, dataset_file: Path, hf_teacher: Program) -> dict[str, Any]:
    """The run that all of these tests disturb."""
    return _spec(models, dataset_file, hf_teacher.target)


@pytest.fixture(scope="module")
def undisturbed(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path_factory: pytest.TempPathFactory
) -> RunDir:
    """The run that nothing happened to."""
    run_dir = make_run(
        tmp_path_factory.mktemp("undisturbed"), "whole", _spec(models, dataset_file, hf_teacher.target)
    )
    assert finish_here(run_dir) == 0
    return run_dir


FAILPOINTS = [
    "checkpoint.before_rename:3",
    *(
        pytest.param(each, marks=pytest.mark.slow)
        for each in (
            "checkpoint.after_weights",
            "checkpoint.after_optimizer:2",
            "checkpoint.after_rename",
            "checkpoint.after_prune",
        )
    ),
    "export.before_rename",
]


@pytest.mark.parametrize("failpoint", FAILPOINTS)
@pytest.mark.faults(row=7)
def test_a_kill_inside_a_save_changes_nothing(
    spec: dict[str, Any],
    undisturbed: RunDir,
    tmp_path: Path,
    failpoint: str,
) -> None:
    run_dir = make_run(tmp_path, "killed", spec)
    with no_process_left() as mark:
        assert finish(run_dir, 1, {**mark, failpoints.VARIABLE: failpoint}) == -signal.SIGKILL
    kept = run_dir.checkpoints()
    assert finish_here(run_dir, 2) == 0
    first, second = events(run_dir, "started")
    assert first["step"] == 0
    assert second["step"] == (kept[-1] if kept else 0)
    assert not list(run_dir.checkpoints_path.glob(".*"))
    assert_same_end(run_dir, undisturbed)


@pytest.mark.slow
@pytest.mark.faults(row=7)
def test_random_kills_change_nothing(spec: dict[str, Any], undisturbed: RunDir, tmp_path: Path) -> None:
    generator = random.Random(7)
    run_dir = make_run(tmp_path, "killed", spec)
    with no_process_left() as mark:
        for attempt in range(1, 4):
            process = start(run_dir, attempt, mark)
            _wait_for_step(run_dir, len(metric(run_dir, "train/loss")) + 1, process)
            time.sleep(generator.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert finish_here(run_dir, 4) == 0
    assert_same_end(run_dir, undisturbed)


@pytest.mark.faults(row=22)
def test_sigterm_ends_with_a_checkpoint_and_resume_goes_on(
    spec: dict[str, Any], undisturbed: RunDir, tmp_path: Path
) -> None:
    run_dir = make_run(tmp_path, "stopped", spec)
    with no_process_left() as mark:
        process = start(run_dir, 1, mark)
        _wait_for_step(run_dir, 1, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        ended = events(run_dir)[-1]
        if ended["kind"] == "stopped":
            assert run_dir.checkpoints()[-1] == ended["step"]
            assert finish_here(run_dir, 2) == 0
    assert_same_end(run_dir, undisturbed)


@pytest.mark.faults(row=7)
def test_a_damaged_checkpoint_is_set_aside(spec: dict[str, Any], undisturbed: RunDir, tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "damaged", spec)
    with no_process_left() as mark:
        assert finish(run_dir, 1, {**mark, failpoints.VARIABLE: "checkpoint.after_rename:3"}) != 0
        assert run_dir.checkpoints()[-2:] == [6, 9]
        weights = run_dir.checkpoint_path(9) / "weights.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    assert finish_here(run_dir, 2) == 0
    assert events(run_dir, "started")[1]["step"] == 6
    assert (run_dir.checkpoints_path / "9.corrupt").is_dir()
    assert_same_end(run_dir, undisturbed)


@pytest.mark.faults(row=21)
def test_a_replaced_attempt_writes_nothing_more(spec: dict[str, Any], tmp_path: Path) -> None:
    spec["optimizer"]["max_steps"] = 100_000
    run_dir = make_run(tmp_path, "fenced", spec)
    with no_process_left() as mark:
        process = start(run_dir, 1, mark)
        _wait_for_step(run_dir, 4, process)
        run_dir.write_control(2, stop=False)
        assert process.wait(60) not in (0, EXIT_FAILED)
    assert {event["kind"] for event in events(run_dir)} <= {"started", "condition", "settled", "checkpoint"}


@pytest.fixture
def own_teacher(models: Models, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Arguments that start a teacher of this test alone, always at one address."""
    with no_process_left() as mark:
        yield {
            "engine": "hf",
            "directory": tmp_path / "teacher",
            "options": [
                "--dtype",
                "float32",
                "--threads",
                "1",
                "--listen",
                f"unix:{tmp_path}/teacher.socket",
            ],
            "environment": mark,
        }


@pytest.mark.slow
@pytest.mark.faults(row=1)
def test_a_teacher_that_dies_and_returns_is_waited_for(
    models: Models,
    dataset_file: Path,
    undisturbed: RunDir,
    own_teacher: dict[str, Any],
    tmp_path: Path,
) -> None:
    target = own_teacher["options"][-1]
    run_dir = make_run(tmp_path, "waiting", _spec(models, dataset_file, target))
    with no_process_left() as mark:
        with start_teacher(models.teacher, **own_teacher) as teacher:
            process = start(run_dir, 1, mark)
            _wait_for_step(run_dir, 2, process, pause=True)
            teacher.kill()
            os.kill(process.pid, signal.SIGCONT)
            _wait_for(lambda: bool(waits(run_dir)), process)
        with start_teacher(models.teacher, **own_teacher):
            assert process.wait(DEADLINE_S) == 0
    assert waits(run_dir) == ["WAITING_FOR_TEACHER", ""]
    assert_same_end(run_dir, undisturbed)


@pytest.mark.faults(row=6)
def test_another_teacher_at_the_same_address_is_refused(
    models: Models, dataset_file: Path, own_teacher: dict[str, Any], tmp_path: Path
) -> None:
    run_dir = make_run(tmp_path, "changed", _spec(models, dataset_file, own_teacher["options"][-1]))
    with no_process_left() as mark:
        with start_teacher(models.teacher, **own_teacher):
            assert finish(run_dir, 1, {**mark, failpoints.VARIABLE: "checkpoint.after_rename"}) != 0
        with start_teacher(models.student, **own_teacher):
            assert finish_here(run_dir, 2) == EXIT_FAILED
    assert "is not the one that this run began with" in failure(run_dir)
    recorded = json.loads(run_dir.teacher_path.read_text())["model_fingerprint"]
    assert recorded in failure(run_dir)


def test_a_teacher_that_was_never_there_fails_soon(
    models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    run_dir = make_run(tmp_path, "alone", _spec(models, dataset_file, f"unix:{tmp_path}/nobody"))
    began = time.monotonic()
    assert finish_here(run_dir) == EXIT_FAILED
    assert time.monotonic() - began < DEADLINE_S
    assert "No teacher answers" in failure(run_dir)


def _wait_for_step(run_dir: RunDir, step: int, process: Any, *, pause: bool = False) -> None:
    """Returns once `step` steps have metrics, or the process has ended; with `pause` it is halted there."""
    _wait_for(lambda: len(metric(run_dir, "train/loss")) >= step, process)
    if pause:
        process.send_signal(signal.SIGSTOP)


def _wait_for(condition: Any, process: Any) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
