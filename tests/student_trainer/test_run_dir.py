"""The run directory: whole files, journals without torn lines, one owner at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.student_trainer.config import proto
from stillhouse.student_trainer.run_dir import MANIFEST, RunDir
from tests.student_trainer.config.specs import SMALLEST, spec_of

HOLDER = """
import sys
import time
from pathlib import Path
from stillhouse.student_trainer.run_dir import RunDir
with RunDir(Path(sys.argv[1])).open_attempt(int(sys.argv[2])) as attempt:
    attempt.report("started", total_steps=3)
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    spec = spec_of(SMALLEST)
    return RunDir.create(tmp_path / "run", spec, proto.to_proto(proto.from_proto(spec)))


def test_specs_are_kept_as_they_were_given(run_dir: RunDir) -> None:
    assert proto.from_proto(run_dir.effective_spec()) == proto.from_proto(spec_of(SMALLEST))
    assert json.loads(run_dir.spec_path.read_text())["student"] == {"model": "org/student"}


def test_a_broken_spec_file_is_named(run_dir: RunDir) -> None:
    run_dir.effective_spec_path.write_text('{"student": {"modell": "x"}}')
    with pytest.raises(StillhouseError, match="not a run specification"):
        run_dir.effective_spec()


def test_lines_are_read_from_where_the_reader_stopped(run_dir: RunDir) -> None:
    run_dir.write_control(1, stop=False)
    with run_dir.open_attempt(1) as attempt:
        attempt.report("started", total_steps=3)
        lines, offset = run_dir.read_lines("events.jsonl", 0)
        attempt.report("checkpoint", step=2)
        attempt.report_metrics(1, {"train/loss": 0.5})
    later, end = run_dir.read_lines("events.jsonl", offset)
    assert [(line["sequence"], line["attempt"], line["kind"]) for line in (*lines, *later)] == [
        (1, 1, "started"),
        (2, 1, "checkpoint"),
    ]
    assert end == run_dir.events_path.stat().st_size
    assert run_dir.read_lines("metrics.jsonl", 0)[0][0]["values"] == {"train/loss": 0.5}


def test_a_torn_last_line_is_not_read_and_cut_by_the_next_attempt(run_dir: RunDir) -> None:
    with run_dir.open_attempt(1) as attempt:
        attempt.report("started", total_steps=3)
    whole = run_dir.events_path.stat().st_size
    with run_dir.events_path.open("ab") as file:
        file.write(b'{"sequence":2,"attempt":1,"ki')
    assert run_dir.read_lines("events.jsonl", 0)[1] == whole
    with run_dir.open_attempt(2) as attempt:
        assert run_dir.events_path.stat().st_size == whole
        attempt.report("started", total_steps=3)
    sequences = [line["sequence"] for line in run_dir.read_lines("events.jsonl", 0)[0]]
    assert sequences == [1, 2]


def test_a_line_that_is_no_object_is_left_out(run_dir: RunDir) -> None:
    run_dir.events_path.write_bytes(
        b'null\n[1]\nnot json\n{"sequence":"1"}\n{"sequence":4,"kind":"stopped"}\n'
    )
    lines, offset = run_dir.read_lines("events.jsonl", 0)
    assert [line["sequence"] for line in lines] == [4]
    assert offset == run_dir.events_path.stat().st_size


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from stillhouse.student_trainer.run_dir import RunDir
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with RunDir(Path(sys.argv[1])).open_attempt(1) as attempt:
    attempt.report("started", total_steps=3)
    limit = attempt.run_dir.events_path.stat().st_size + 20
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        attempt.report("condition", condition="WAITING_FOR_TEACHER")
    except OSError:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        attempt.report("checkpoint", step=1)
"""


def test_half_a_line_on_a_full_disk_does_not_spoil_the_next(run_dir: RunDir) -> None:
    subprocess.run([sys.executable, "-c", FULL_DISK, str(run_dir.path)], check=True, timeout=60)
    kinds = [line["kind"] for line in run_dir.read_lines("events.jsonl", 0)[0]]
    assert kinds == ["started", "checkpoint"]


def test_stop_is_seen_by_the_attempt_that_runs(run_dir: RunDir) -> None:
    run_dir.write_control(1, stop=False)
    with run_dir.open_attempt(1) as attempt:
        assert not attempt.stop_requested
        run_dir.request_stop()
        assert attempt.stop_requested
        attempt.check_fence()


def test_an_attempt_that_was_replaced_may_not_write(run_dir: RunDir) -> None:
    run_dir.write_control(1, stop=False)
    with run_dir.open_attempt(1) as attempt:
        run_dir.write_control(2, stop=False)
        assert attempt.stop_requested
        with pytest.raises(StillhouseError, match="attempt 1 of run was replaced by attempt 2"):
            attempt.check_fence()
    with pytest.raises(StillhouseError) as caught, run_dir.open_attempt(1):
        pass
    assert caught.value.reason is Reason.RUN_STATE


def test_one_process_at_a_time_holds_a_run(run_dir: RunDir) -> None:
    assert run_dir.locked_by_live_process() is None
    run_dir.write_control(3, stop=False)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir.path), "3"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"open\n"
        record = run_dir.locked_by_live_process()
        assert record is not None
        assert (record.attempt, record.pid) == (3, holder.pid)
        with pytest.raises(StillhouseError, match="locked by another process"), run_dir.open_attempt(3):
            pass
        holder.kill()
        holder.wait()
    assert run_dir.locked_by_live_process() is None
    assert not record.alive
    with run_dir.open_attempt(3):
        record = run_dir.locked_by_live_process()
        assert record is not None
        assert record.pid == os.getpid()


def test_a_record_of_another_process_with_the_same_pid_is_not_taken_for_it(run_dir: RunDir) -> None:
    with run_dir.open_attempt(1):
        record = json.loads(run_dir.process_path.read_text())
        write_atomic(run_dir.process_path, json.dumps(record | {"start_time": 1.0}).encode())
        assert run_dir.locked_by_live_process() is None


def test_a_process_is_known_again_after_the_clock_was_set(run_dir: RunDir) -> None:
    """The kernel's boot time moves with the clock."""
    with run_dir.open_attempt(1):
        record = run_dir.process()
    assert record is not None
    boot, ticks = record.start_time.split()
    assert Path("/proc/sys/kernel/random/boot_id").read_text().strip() == boot
    assert 0 < int(ticks) / os.sysconf("SC_CLK_TCK") <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_nothing_is_written_for_an_attempt_that_was_replaced(run_dir: RunDir) -> None:
    run_dir.write_control(1, stop=False)
    with run_dir.open_attempt(1) as attempt:
        attempt.report("started", total_steps=1, step=0)
        run_dir.write_control(2, stop=False)
        for write in (lambda: attempt.report("stopped", step=0), lambda: attempt.report_metrics(1, {})):
            with pytest.raises(StillhouseError, match="was replaced by attempt 2"):
                write()
    assert [line["kind"] for line in run_dir.read_lines("events.jsonl", 0)[0]] == ["started"]
    assert run_dir.read_lines("metrics.jsonl", 0) == ([], 0)


def test_only_complete_checkpoints_count(run_dir: RunDir) -> None:
    for name, complete in (("10", True), ("9", True), ("20", False), ("20.tmp", True)):
        (run_dir.checkpoints_path / name).mkdir()
        if complete:
            (run_dir.checkpoints_path / name / MANIFEST).touch()
    assert run_dir.checkpoints() == [9, 10]
