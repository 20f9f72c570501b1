"""A full disk, a real one: what was whole stays whole, the run says where there is no room, and goes on once there is."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from stillhouse.protos.cache.reader import CacheReader
from stillhouse.protos.errors import Reason, from_rpc_error, from_status
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.student_trainer.run_dir import EXIT_FAILED, RunDir
from stillhouse.student_trainer.train.checkpointing.checkpoint import find_damage
from tests.conftest import Models
from tests.faults.world import World, get_run, insist, world
from tests.student_trainer.runs.api.caller import stub_for
from tests.student_trainer.train.runs import (
    assert_ends,
    assert_same_end,
    events,
    finish_here,
    make_run,
    spec_of,
    start,
)
from tests.support.privileges import disk_of, preloaded
from tests.support.processes import no_process_left
from tests.support.programs import Program
from tests.support.runs import wait_until

STEPS = 200
MODEL = "model.safetensors"
DISK_BYTES = 24 * 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with DISK_BYTES."""
    with disk_of(tmp_path / "disk", DISK_BYTES) as path:
        yield path


def fill(disk: Path, *, leave_bytes: int = 0) -> Path:
    """A file that takes all room but `leave_bytes`."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 65536)
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x")
    os.truncate(filler, filler.stat().st_size - leave_bytes)
    return filler


def spec(models: Models, data: Path, target: str) -> dict[str, Any]:
    return spec_of(
        models.student,
        data,
        target,
        data={"eval_fraction": 0},
        optimizer={"max_steps": STEPS, "grad_accum_steps": 1},
        checkpoint={"every_steps": 5, "keep": 2},
    )


@pytest.fixture
def environment() -> Iterator[Mapping[str, str]]:
    with no_process_left() as mark:
        yield mark


def assert_says_where(message: str, disk: Path) -> None:
    """The sentence names the disk, the path, the free bytes and what to do."""
    assert str(disk) in message
    assert f"of {DISK_BYTES} bytes free" in message
    assert "Free some space" in message
    assert "resume" in message


def error_of(
    run_dir: RunDir, environment: Mapping[str, str], breaks: Callable[[int], object]
) -> dict[str, Any]:
    """Reason of failure of a run that `breaks`, given its process, after two checkpoints. Whole checkpoints are left, and no part of one."""
    process = start(run_dir, 1, environment)
    wait_until(lambda: len(run_dir.checkpoints()) == 2 or process.poll() is not None, "two checkpoints")
    assert process.poll() is None, run_dir.log_path(1).read_text()[-3000:]
    breaks(process.pid)
    assert_ends(process, run_dir, EXIT_FAILED, within_s=60)
    kept = run_dir.checkpoints()
    assert kept
    assert all(find_damage(run_dir.checkpoint_path(step)) is None for step in kept)
    assert not list(run_dir.checkpoints_path.glob(".*")), "a part of a checkpoint was left"
    error: dict[str, Any] = events(run_dir, "failed")[-1]["error"]
    return error


def assert_goes_on(run_dir: RunDir, undisturbed: RunDir) -> None:
    """The next attempt begins at the last checkpoint, and ends like the run that nothing happened to."""
    last = run_dir.checkpoints()[-1]
    assert finish_here(run_dir, 2) == 0
    assert events(run_dir, "started")[1]["step"] == last
    assert_same_end(run_dir, undisturbed)


@pytest.mark.faults(row=10)
def test_a_checkpoint_without_room_leaves_the_last_one_and_the_run_goes_on_from_it(
    *,
    models: Models,
    dataset_file: Path,
    hf_teacher: Program,
    undisturbed: RunDir,
    environment: Mapping[str, str],
    small_disk: Path,
) -> None:
    run_dir = make_run(small_disk, "full", spec(models, dataset_file, hf_teacher.target))
    error = error_of(run_dir, environment, lambda _: fill(small_disk, leave_bytes=40_000))
    assert error["code"] == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert_says_where(error["message"], small_disk)
    (small_disk / "filler").unlink()
    assert_goes_on(run_dir, undisturbed)


@pytest.mark.slow
@pytest.mark.faults(row=10)
def test_a_file_that_may_not_grow_leaves_the_last_checkpoint_and_the_run_goes_on_from_it(
    *,
    models: Models,
    dataset_file: Path,
    hf_teacher: Program,
    undisturbed: RunDir,
    environment: Mapping[str, str],
    tmp_path: Path,
) -> None:
    """RLIMIT_FSIZE: the write that meets the limit is cut short, and the next one fails with EFBIG."""
    run_dir = make_run(tmp_path, "short", spec(models, dataset_file, hf_teacher.target))

    def limit(pid: int) -> None:
        size = (run_dir.checkpoint_path(run_dir.checkpoints()[-1]) / MODEL).stat().st_size // 2
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, size))

    error = error_of(run_dir, environment, limit)
    assert error["code"] == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
    assert "ulimit -f" in error["message"]
    assert len(run_dir.checkpoints()) == 2
    assert_goes_on(run_dir, undisturbed)


@pytest.mark.slow
@pytest.mark.faults(row=10)
def test_a_disk_that_fails_leaves_the_last_checkpoint_and_is_named(
    *,
    models: Models,
    dataset_file: Path,
    hf_teacher: Program,
    undisturbed: RunDir,
    environment: Mapping[str, str],
    tmp_path: Path,
) -> None:
    """fsync that answers EIO: what was written before may be anywhere, so that checkpoint does not count."""
    failing = preloaded(Path(__file__).with_name("fsync_error.c"), tmp_path)
    switch = tmp_path / "fails"
    failing |= {"FSYNC_ERROR_FILE": str(switch), "FSYNC_ERROR_IN": "/checkpoints/"}
    run_dir = make_run(tmp_path, "failing", spec(models, dataset_file, hf_teacher.target))
    error = error_of(run_dir, {**environment, **failing}, lambda _: switch.touch())
    assert error["code"] == grpc.StatusCode.DATA_LOSS.value[0]
    assert "Input/output error" in error["message"]
    assert "the disk mounted at" in error["message"]
    assert_goes_on(run_dir, undisturbed)


@pytest.mark.faults(row=10)
@pytest.mark.slow
def test_a_service_without_room_answers_reads_and_says_so_once_it_can(
    *, models: Models, dataset_file: Path, hf_teacher: Program, undisturbed: RunDir, small_disk: Path
) -> None:
    """Database, journals, logs and checkpoints share the full disk."""
    with world(small_disk, models.teacher) as here:
        here.start_service()
        request = pb.CreateRunRequest(
            spec=json_format.ParseDict(spec(models, dataset_file, hf_teacher.target), pb.RunSpec())
        )
        with stub_for(here.service_target) as stub:
            name = stub.CreateRun(request, timeout=30).name
            run_dir = here.run_dir(name)
            wait_until(lambda: len(run_dir.checkpoints()) == 2, "two checkpoints")
            filler = fill(small_disk)
            wait_until(lambda: here.training_pid(name) is None, "the end of the training process")
            run = stub.GetRun(pb.GetRunRequest(name=name), timeout=30)
            assert run.name == name
            assert [each.name for each in stub.ListRuns(pb.ListRunsRequest(), timeout=30).runs] == [name]
            assert stub.QueryMetrics(pb.QueryMetricsRequest(name=name), timeout=30).series
            assert stub.ListArtifacts(pb.ListArtifactsRequest(name=name), timeout=60).artifacts
            with pytest.raises(grpc.RpcError) as refused:
                stub.CreateRun(request, timeout=30)
            assert from_rpc_error(refused.value, target="", service="trainer").reason is Reason.DISK_FULL
            filler.unlink()
            wait_until(lambda: failed(here, name), "that the service says why")
            error = from_status(get_run(here.service_target, name).error)
            assert error.reason is Reason.DISK_FULL, error.message
            assert_says_where(error.message, small_disk)
            insist(lambda stub: stub.ResumeRun(pb.ResumeRunRequest(name=name)), here.service_target)
            wait_until(
                lambda: get_run(here.service_target, name).state == Run.STATE_COMPLETED, "the end of the run"
            )
        assert_same_end(run_dir, undisturbed)
        fill(small_disk)
        with stub_for(here.service_target) as stub:
            stub.DeleteRun(pb.DeleteRunRequest(name=name), timeout=30)  # which makes room
            assert not stub.ListRuns(pb.ListRunsRequest(), timeout=30).runs
        assert not run_dir.path.exists()


def failed(here: World, name: str) -> bool:
    return get_run(here.service_target, name).state == Run.STATE_FAILED


@pytest.mark.faults(row=10)
def test_a_cache_without_room_keeps_its_whole_shards(
    *,
    models: Models,
    dataset_file: Path,
    hf_teacher: Program,
    environment: Mapping[str, str],
    small_disk: Path,
    tmp_path: Path,
) -> None:
    values = spec(models, dataset_file, hf_teacher.target)
    values |= {"task": "cache", "cache": {"path": "caches/set"}}
    (tmp_path / "caches").symlink_to(small_disk)
    filler = fill(small_disk, leave_bytes=20_000)
    run_dir = make_run(tmp_path, "build", values)
    process = start(run_dir, 1, environment)
    assert_ends(process, run_dir, EXIT_FAILED, within_s=60)
    message = events(run_dir, "failed")[-1]["error"]["message"]
    assert "room" in message
    assert str(small_disk) in message
    filler.unlink()
    run_dir.write_control(2, stop=False)
    assert finish_here(run_dir, 2) == 0, events(run_dir, "failed")
    assert len(CacheReader(small_disk / "set")) == 64
