"""Real training runs under a service that is stopped, killed and restarted."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from stillhouse.protos.errors import Reason, from_status
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.protos.stillhouse.v1.run_pb2_grpc import RunServiceStub
from tests.conftest import Models
from tests.student_trainer.config.specs import cross_entropy_spec
from tests.student_trainer.runs.api.caller import PATIENCE_S, stub_for, wait_ended, wait_step, watch
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_trainer

pytestmark = pytest.mark.model
ENDLESS = 1_000_000


def training_pid(data_dir: Path, name: str) -> int:
    return int(json.loads((data_dir / name / "process.json").read_text())["pid"])


def test_a_run_trains_and_reports_everything(
    trainer_service: Callable[..., Program], models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    with stub_for(trainer_service().target) as stub:
        spec = cross_entropy_spec(models.student, dataset_file, steps=5)
        name = stub.CreateRun(pb.CreateRunRequest(spec=spec)).name
        seen = watch(stub, name)
        run = stub.GetRun(pb.GetRunRequest(name=name))
        assert run.state == Run.STATE_COMPLETED, run.error.message
        assert run.caller_may_control
        run.ClearField("caller_may_control")  # which changes do not tell, nor the curve
        run.progress.ClearField("loss")
        assert seen[-1].run == run
        later = [each.sequence for each in seen[1:]]
        assert later == list(range(later[0], later[0] + len(later)))
        assert watch(stub, name, after=later[2]) == seen[4:]
        states = [
            state for state, _ in itertools.groupby(each.run.state for each in seen if each.HasField("run"))
        ]
        assert states[-2:] == [Run.STATE_RUNNING, Run.STATE_COMPLETED]
        assert (run.progress.step, run.progress.total_steps) == (5, 5)
        assert run.progress.trained_tokens > 0
        assert (run.attempts[0].first_step, run.attempts[0].last_step, run.attempts[0].exit_code) == (1, 5, 0)
        assert run.latest_checkpoint == f"{name}/checkpoints/5"
        series = {each.key: each for each in stub.QueryMetrics(pb.QueryMetricsRequest(name=name)).series}
        assert list(series["train/loss"].steps) == [1, 2, 3, 4, 5]
        assert list(series["eval/perplexity"].steps) == [0, 5]
        request = pb.QueryMetricsRequest(name=name, keys=["train/loss"], start_step=2, end_step=4)
        (part,) = stub.QueryMetrics(request).series
        assert list(part.steps) == [2, 3]
        listed = {
            each.path: each for each in stub.ListArtifacts(pb.ListArtifactsRequest(name=name)).artifacts
        }
        assert {"final/model.safetensors", "final/tokenizer.json", "checkpoints/5/MANIFEST.json"} <= set(
            listed
        )
        weights = tmp_path / "trainer-data" / name / "final" / "model.safetensors"
        pieces = stub.DownloadArtifact(pb.DownloadArtifactRequest(name=name, path="final/model.safetensors"))
        content = b"".join(piece.data for piece in pieces)
        assert content == weights.read_bytes()
        assert listed["final/model.safetensors"].sha256 == hashlib.sha256(content).hexdigest()
        log = b"".join(each.data for each in stub.StreamLogs(pb.StreamLogsRequest(name=name, follow=True)))
        assert b"run completed" in log
        stub.DeleteRun(pb.DeleteRunRequest(name=name))
        assert not weights.exists()


@pytest.mark.faults(row=9)
def test_a_run_survives_stops_kills_and_restarts_of_its_service(
    models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    spec = cross_entropy_spec(models.student, dataset_file, steps=ENDLESS)
    with no_process_left() as mark:

        def start(name: str) -> Program:
            options = ["--stop-grace-s", "60"]
            return start_trainer(data_dir, directory=tmp_path / name, options=options, environment=mark)

        with start("first") as program, stub_for(program.target) as stub:
            name = stub.CreateRun(pb.CreateRunRequest(spec=spec)).name
            wait_step(stub, name, 3)
            assert stub.StopRun(pb.StopRunRequest(name=name)).state == Run.STATE_STOPPING
            assert stub.StopRun(pb.StopRunRequest(name=name)).state in (Run.STATE_STOPPING, Run.STATE_STOPPED)
            run = wait_ended(stub, name)
            assert run.state == Run.STATE_STOPPED
            stopped_at = run.progress.step
            assert run.latest_checkpoint == f"{name}/checkpoints/{stopped_at}"

            assert stub.ResumeRun(pb.ResumeRunRequest(name=name)).state == Run.STATE_PENDING
            wait_step(stub, name, stopped_at + 1, attempt=2)
            os.kill(training_pid(data_dir, name), signal.SIGKILL)
            run = wait_ended(stub, name)
            assert run.state == Run.STATE_FAILED
            assert from_status(run.error).reason in (Reason.PROCESS_DIED, Reason.OUT_OF_MEMORY)
            assert (run.attempts[1].signal, run.attempts[1].exit_code) == (9, 137)
            assert run.attempts[1].first_step == stopped_at + 1

            stub.ResumeRun(pb.ResumeRunRequest(name=name))
            seen = wait_step(stub, name, stopped_at + 1, attempt=3)
            pid = training_pid(data_dir, name)
            program.process.send_signal(signal.SIGTERM)
            assert program.process.wait(30) == 0
            assert psutil.pid_exists(pid)

        with start("second") as program, stub_for(program.target) as stub:
            # The first block ends every descendant of its service; this one was no longer its child.
            assert psutil.pid_exists(pid)
            sequence = wait_step(stub, name, stopped_at + 5, attempt=3)
            assert sequence > seen
            program.process.kill()
            program.process.wait()

        with start("third") as program, stub_for(program.target) as stub:
            run = stub.GetRun(pb.GetRunRequest(name=name))
            assert run.state == Run.STATE_RUNNING
            assert len(run.attempts) == 3
            missed = stub.WatchRun(pb.WatchRunRequest(name=name, after_sequence=sequence), timeout=60)
            assert [each.sequence for each in itertools.islice(missed, 3)] == list(
                range(sequence + 1, sequence + 4)
            )
            missed.cancel()
            stub.StopRun(pb.StopRunRequest(name=name))
            run = wait_ended(stub, name)
            assert run.state == Run.STATE_STOPPED
            (losses,) = stub.QueryMetrics(
                pb.QueryMetricsRequest(name=name, keys=["train/loss"], max_points=20_000)
            ).series
            assert list(losses.steps) == list(range(1, run.progress.step + 1))


def test_a_process_that_dies_is_retried_and_one_that_hangs_is_killed_after_the_grace(
    trainer_service: Callable[..., Program], models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    spec = cross_entropy_spec(models.student, dataset_file, steps=ENDLESS)
    spec.retry.max_attempts = 2
    data_dir = tmp_path / "trainer-data"
    with stub_for(trainer_service("--stop-grace-s", "1").target) as stub:
        name = stub.CreateRun(pb.CreateRunRequest(spec=spec)).name
        wait_step(stub, name, 1)
        os.kill(training_pid(data_dir, name), signal.SIGKILL)
        wait_step(stub, name, 1, attempt=2)
        os.kill(training_pid(data_dir, name), signal.SIGSTOP)
        stub.StopRun(pb.StopRunRequest(name=name))
        run = wait_ended(stub, name)
    assert run.state == Run.STATE_STOPPED
    assert [attempt.signal for attempt in run.attempts] == [signal.SIGKILL, signal.SIGKILL]
    assert "was killed (exit 137)" in run.attempts[0].error.message
    assert "did not exit in time" in run.attempts[1].error.message


@pytest.mark.faults(row=21)
@pytest.mark.slow
def test_a_suspended_process_is_detected_and_replaced(
    trainer_service: Callable[..., Program], models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    spec = cross_entropy_spec(models.student, dataset_file, steps=ENDLESS)
    spec.retry.max_attempts = 2
    spec.checkpoint.every_steps = 1
    with stub_for(trainer_service("--max-silence-s", "20").target) as stub:
        name = stub.CreateRun(pb.CreateRunRequest(spec=spec)).name
        wait_step(stub, name, 2)
        pid = training_pid(tmp_path / "trainer-data", name)
        os.kill(pid, signal.SIGSTOP)
        asleep = wait_condition(stub, name, Run.CONDITION_NOT_RESPONDING)
        os.kill(pid, signal.SIGCONT)
        wait_condition(stub, name, Run.CONDITION_UNSPECIFIED, after=asleep)
        os.kill(pid, signal.SIGSTOP)
        step = wait_step(stub, name, 1, attempt=2)
        assert step > asleep
        assert not psutil.pid_exists(pid)
        stub.StopRun(pb.StopRunRequest(name=name))
        run = wait_ended(stub, name)
    assert run.state == Run.STATE_STOPPED
    assert [attempt.signal for attempt in run.attempts] == [signal.SIGKILL, 0]
    assert "sent no heartbeat" in run.attempts[0].error.message
    assert 1 < run.attempts[1].first_step <= run.attempts[0].last_step + 1


def wait_condition(
    stub: RunServiceStub, name: str, condition: Run.Condition.ValueType, *, after: int = 0
) -> int:
    """Waits until the run has this condition; returns the sequence of its event."""
    call: Any = stub.WatchRun(pb.WatchRunRequest(name=name, after_sequence=after), timeout=PATIENCE_S)
    for event in call:
        if event.HasField("run") and event.sequence > after and event.run.condition == condition:
            call.cancel()
            return int(event.sequence)
    raise AssertionError(f"{name} ended before that was said")


@pytest.mark.faults(row=22)
def test_the_service_stops_its_runs_at_exit_if_configured(
    trainer_service: Callable[..., Program], models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    program = trainer_service()
    spec = cross_entropy_spec(models.student, dataset_file, steps=ENDLESS)
    with stub_for(program.target) as stub:
        name = stub.CreateRun(pb.CreateRunRequest(spec=spec)).name
        waiting = stub.CreateRun(pb.CreateRunRequest(spec=spec)).name
        wait_step(stub, name, 2)
        pid = training_pid(tmp_path / "trainer-data", name)
        program.process.send_signal(signal.SIGTERM)
        assert program.process.wait(60) == 0
    assert not psutil.pid_exists(pid)
    with stub_for(trainer_service("--cpu-slots", "0").target) as stub:
        run = stub.GetRun(pb.GetRunRequest(name=name))
        assert run.state == Run.STATE_STOPPED
        assert run.latest_checkpoint
        refused = wait_ended(stub, waiting)
    assert "--cpu-slots" in refused.error.message


def test_the_processes_of_a_run_end_together(
    trainer_service: Callable[..., Program], models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    spec = cross_entropy_spec(models.student, dataset_file, steps=ENDLESS)
    spec.resources.num_processes = 2
    spec.checkpoint.every_steps = 2
    with stub_for(trainer_service().target) as stub:
        name = stub.CreateRun(pb.CreateRunRequest(spec=spec)).name
        wait_step(stub, name, 3)
        first = psutil.Process(training_pid(tmp_path / "trainer-data", name))
        (second,) = [each for each in first.children() if "--worker" in each.cmdline()]
        assert os.getpgid(second.pid) == os.getpgid(first.pid)
        second.kill()
        run = wait_ended(stub, name)
        assert run.state == Run.STATE_FAILED
        assert "Process 1 of 2 (from 0) was ended by SIGKILL" in run.error.message
        stub.ResumeRun(pb.ResumeRunRequest(name=name))
        wait_step(stub, name, run.progress.step + 1, attempt=2)
        stub.StopRun(pb.StopRunRequest(name=name))
        run = wait_ended(stub, name)
        assert run.state == Run.STATE_STOPPED
        assert run.latest_checkpoint == f"{name}/checkpoints/{run.progress.step}"
        last = tmp_path / "trainer-data" / run.latest_checkpoint
        assert (last / "MANIFEST.json").is_file()
