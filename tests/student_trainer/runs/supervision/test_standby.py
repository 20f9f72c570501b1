"""The standby process of a run service: the run that takes it, and its end with whatever happens around it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path

import psutil
import pytest

from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.protos.telemetry.host_cores import usable_cores
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.runs.data_dir import DataDir
from stillhouse.student_trainer.runs.settings import RunServiceSettings, StandbyMode
from stillhouse.student_trainer.runs.supervision import training_process
from stillhouse.student_trainer.runs.supervision.first_standby import FirstStandby
from stillhouse.student_trainer.runs.supervision.standby import (
    FREE_BYTES,
    TAKE_OVER_S,
    Expected,
    Standby,
    end_leftovers,
)
from stillhouse.student_trainer.runs.supervision.training_process import Exit
from tests.conftest import Models
from tests.student_trainer.config.specs import SMALLEST, cross_entropy_spec, spec_of
from tests.student_trainer.runs.api.caller import PATIENCE_S, stub_for, wait_ended, wait_step
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_trainer
from tests.support.runs import wait_until

ENDLESS = 1_000_000


def standby_pids(data_dir: Path) -> list[int]:
    """Processes that were started to wait for a run of this service, whether they have one by now or not."""
    wanted = training_process.standby_command(data_dir)[1:]
    return [
        each.pid for each in psutil.process_iter(["cmdline"]) if (each.info["cmdline"] or [])[1:] == wanted
    ]


def wait_standby(data_dir: Path, *, besides: Collection[int] = ()) -> psutil.Process:
    """The one standby process, once it has imported its libraries; those `besides` have a run."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        for pid in set(standby_pids(data_dir)) - set(besides):
            maps = Path(f"/proc/{pid}/maps").read_text()
            # Of the last module that it imports before it waits, torch is long loaded.
            if "libtorch_cpu" in maps:
                return psutil.Process(pid)
        time.sleep(0.05)
    raise AssertionError("no standby process")


def oom_score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def threads_of(pid: int) -> int:
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).environ()["OMP_NUM_THREADS"])
    return 0


def training_pid(data_dir: Path, name: str) -> int:
    return int(json.loads((data_dir / name / "process.json").read_text())["pid"])


@pytest.mark.model
def test_a_queued_run_takes_the_standby_process(
    trainer_service: Callable[..., Program], models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    data_dir = tmp_path / "trainer-data"
    endless = cross_entropy_spec(models.student, dataset_file, steps=ENDLESS)
    with stub_for(trainer_service("--standby", "queue").target) as stub:
        first = stub.CreateRun(pb.CreateRunRequest(spec=endless)).name
        wait_step(stub, first, 1)
        earlier = training_pid(data_dir, first)
        assert not set(standby_pids(data_dir)) - {earlier}  # no run is near while one trains
        second = stub.CreateRun(pb.CreateRunRequest(spec=endless)).name
        standby = wait_standby(data_dir, besides=[earlier])
        assert oom_score(standby.pid) == 1000
        stub.StopRun(pb.StopRunRequest(name=first))
        wait_step(stub, second, 2)
        assert oom_score(standby.pid) == oom_score(standby.ppid())
        assert training_pid(data_dir, second) == standby.pid != training_pid(data_dir, first)
        assert os.getpgid(standby.pid) == standby.pid
        assert Path(standby.cwd()) == data_dir / second
        assert standby_pids(data_dir) == [standby.pid]  # nothing is queued behind it
        log = (data_dir / second / "attempts" / "1" / "log").read_text()
        assert f'"run": "{second.removeprefix("runs/")}"' in log
        stub.StopRun(pb.StopRunRequest(name=second))
        run = wait_ended(stub, second)
    assert (run.state, run.attempts[0].exit_code) == (Run.STATE_STOPPED, 0)
    assert run.latest_checkpoint


@pytest.mark.model
@pytest.mark.slow
def test_a_run_takes_the_standby_process_of_a_call_or_of_a_run_before_it(
    trainer_service: Callable[..., Program], models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    if psutil.virtual_memory().available < FREE_BYTES:
        pytest.skip("no process waits where memory is short")
    data_dir = tmp_path / "trainer-data"
    spec = cross_entropy_spec(models.student, dataset_file, steps=1)
    with stub_for(trainer_service("--standby", "queue").target) as stub:
        stub.CreateRun(pb.CreateRunRequest(spec=spec, validate_only=True))
        taken: list[int] = []
        for _ in range(2):
            standby = wait_standby(data_dir, besides=taken)
            name = stub.CreateRun(pb.CreateRunRequest(spec=spec)).name
            run = wait_ended(stub, name)
            assert training_pid(data_dir, name) == standby.pid
            assert run.state == Run.STATE_COMPLETED
            taken.append(standby.pid)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_run_starts_without_a_standby_process_that_cannot_take_it(
    trainer_service: Callable[..., Program],
    models: Models,
    dataset_file: Path,
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    data_dir = tmp_path / "trainer-data"
    with stub_for(trainer_service("--standby", "queue").target) as stub:
        endless = cross_entropy_spec(models.student, dataset_file, steps=ENDLESS)
        first = stub.CreateRun(pb.CreateRunRequest(spec=endless)).name
        second = stub.CreateRun(
            pb.CreateRunRequest(spec=cross_entropy_spec(models.student, dataset_file))
        ).name
        wait_step(stub, first, 1)
        standby = wait_standby(data_dir, besides=[training_pid(data_dir, first)])
        standby.send_signal(number)
        stub.StopRun(pb.StopRunRequest(name=first))
        run = wait_ended(stub, second)
        assert (run.state, len(run.attempts)) == (Run.STATE_COMPLETED, 1)
        assert training_pid(data_dir, second) != standby.pid
        assert not psutil.pid_exists(standby.pid)


@pytest.mark.model
@pytest.mark.parametrize("moment", ["given", "taken", "opened"])
def test_a_run_whose_standby_process_is_killed_before_a_step_begins_in_a_new_one(
    moment: str,
    trainer_service: Callable[..., Program],
    models: Models,
    dataset_file: Path,
    tmp_path: Path,
) -> None:
    data_dir = tmp_path / "trainer-data"
    spec = cross_entropy_spec(models.student, dataset_file, steps=1)
    service = trainer_service("--standby", "always")
    with stub_for(service.target) as stub:
        stub.CreateRun(pb.CreateRunRequest(spec=spec, validate_only=True))
        wait_until(
            lambda: set(map(threads_of, standby_pids(data_dir))) == {usable_cores()}, "one fits the run"
        )
        (standby,) = map(psutil.Process, standby_pids(data_dir))  # which imports libraries
        if moment == "given":
            standby.suspend()
        name = stub.CreateRun(pb.CreateRunRequest(spec=spec)).name
        log, opened = data_dir / name / "attempts" / "1" / "log", data_dir / name / "process.json"
        reached = {"given": log.exists, "opened": opened.exists}
        wait_until(reached.get(moment, lambda: training_process.writes_below(standby, log)), moment)
        assert opened.exists() == (moment == "opened")
        standby.kill()
        run = wait_ended(stub, name)
        assert training_pid(data_dir, name) != standby.pid
    assert run.state == Run.STATE_COMPLETED, run.error.message
    # It may have taken the run without having told so.
    attempts = {"given": [1], "taken": [1, 2], "opened": [2]}[moment]
    assert len(run.attempts) in attempts
    if len(run.attempts) == 1:
        assert "standby process does not take the run" in service.log()
        return
    assert (run.attempts[0].signal, run.attempts[0].last_step) == (signal.SIGKILL, 0)
    assert "had waited for the run" in run.attempts[0].error.message
    assert "had waited for the run" in service.log()
    assert "passes halved" not in (data_dir / name / "attempts" / "2" / "log").read_text()


@pytest.mark.model
@pytest.mark.slow
def test_a_run_learns_the_same_in_a_standby_process(
    trainer_service: Callable[..., Program], models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    data_dir = tmp_path / "trainer-data"
    spec = cross_entropy_spec(models.student, dataset_file)
    with stub_for(trainer_service(data_dir=tmp_path / "cold").target) as stub:
        alone = stub.CreateRun(pb.CreateRunRequest(spec=spec)).name
        wait_ended(stub, alone)
    with stub_for(trainer_service("--standby", "queue").target) as stub:
        endless = cross_entropy_spec(models.student, dataset_file, steps=ENDLESS)
        first = stub.CreateRun(pb.CreateRunRequest(spec=endless)).name
        queued = stub.CreateRun(pb.CreateRunRequest(spec=spec)).name
        wait_step(stub, first, 1)
        standby = wait_standby(data_dir, besides=[training_pid(data_dir, first)])
        stub.StopRun(pb.StopRunRequest(name=first))
        wait_ended(stub, queued)
    assert training_pid(data_dir, queued) == standby.pid
    folders = tmp_path / "cold" / alone, data_dir / queued
    weights = [(each / "final" / "model.safetensors").read_bytes() for each in folders]
    assert weights[0] == weights[1]


@pytest.mark.model
@pytest.mark.slow
def test_a_standby_process_ends_with_its_service(models: Models, dataset_file: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    endless = cross_entropy_spec(models.student, dataset_file, steps=ENDLESS)
    with no_process_left() as mark:
        options = ["--standby", "always"]
        with start_trainer(data_dir, directory=tmp_path / "1", options=options, environment=mark) as program:
            waiting = wait_standby(data_dir)
            with stub_for(program.target) as stub:
                name = stub.CreateRun(pb.CreateRunRequest(spec=endless)).name
                wait_step(stub, name, 1)
            training = psutil.Process(training_pid(data_dir, name))
            waiting = next(psutil.Process(each) for each in standby_pids(data_dir) if each != training.pid)
            program.process.kill()
            program.process.wait()
            waiting.wait(PATIENCE_S)
            assert training.is_running()
        options = ["--standby", "off", "--stop-runs-on-exit"]
        with (
            start_trainer(data_dir, directory=tmp_path / "2", options=options, environment=mark) as program,
            stub_for(program.target) as stub,
        ):
            assert training.is_running()
            stub.StopRun(pb.StopRunRequest(name=name))
            run = wait_ended(stub, name)
    assert (run.state, len(run.attempts)) == (Run.STATE_STOPPED, 1)


@pytest.mark.model
@pytest.mark.slow
def test_a_run_that_a_standby_process_takes_while_its_service_dies_is_adopted(
    models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    with no_process_left() as mark:
        options = ["--standby", "queue"]
        with (
            start_trainer(data_dir, directory=tmp_path / "1", options=options, environment=mark) as program,
            stub_for(program.target) as stub,
        ):
            endless = cross_entropy_spec(models.student, dataset_file, steps=ENDLESS)
            first = stub.CreateRun(pb.CreateRunRequest(spec=endless)).name
            second = stub.CreateRun(pb.CreateRunRequest(spec=endless)).name
            wait_step(stub, first, 1)
            standby = wait_standby(data_dir, besides=[training_pid(data_dir, first)])
            standby.suspend()
            stub.StopRun(pb.StopRunRequest(name=first))
            wait_until((data_dir / second / "attempts" / "1" / "log").exists, "the run is given away")
            time.sleep(0.2)  # the order follows at once
            program.process.kill()
            program.process.wait()
            standby.resume()
            options = ["--standby", "off", "--stop-runs-on-exit"]
            with (
                start_trainer(data_dir, directory=tmp_path / "2", options=options, environment=mark) as later,
                stub_for(later.target) as other,
            ):
                wait_step(other, second, 1)
                assert training_pid(data_dir, second) == standby.pid
                other.StopRun(pb.StopRunRequest(name=second))
                run = wait_ended(other, second)
    assert (run.state, len(run.attempts)) == (Run.STATE_STOPPED, 1)


def expected(environ: dict[str, str]) -> Expected:
    return Expected(environ=environ, adapter=False)


def test_a_standby_process_that_does_not_fit_is_ended(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path / "runs" / "aaaaaaaaaaaa", spec_of(SMALLEST), spec_of(SMALLEST))

    def environ(threads: int, *, halve: bool = False) -> dict[str, str]:
        return training_process.environment(
            devices=(), threads=threads, credentials=tmp_path / "none", halve=halve
        )

    standby = Standby(tmp_path)
    try:
        standby.keep(expected(environ(1)))
        (pid,) = standby_pids(tmp_path)
        standby.keep(expected(environ(1, halve=True)))  # what is not read at import makes no difference
        assert standby_pids(tmp_path) == [pid]
        assert standby.take(run_dir, 1, environ(2)) is None
        assert not standby_pids(tmp_path)
        assert not run_dir.log_path(1).exists()

        standby.keep(expected(environ(1)))
        (pid,) = standby_pids(tmp_path)
        standby.keep(expected(environ(2)))
        (other,) = standby_pids(tmp_path)
        assert other != pid
        standby.keep(None)
        assert not standby_pids(tmp_path)
    finally:
        standby.close()
    standby.keep(expected(environ(1)))
    assert not standby_pids(tmp_path)


def test_a_standby_process_that_dies_is_not_started_again_before_the_next_run(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path / "runs" / "aaaaaaaaaaaa", spec_of(SMALLEST), spec_of(SMALLEST))
    environ = training_process.environment(devices=(), threads=1, credentials=tmp_path / "none")
    standby = Standby(tmp_path)
    try:
        standby.keep(expected(environ))
        (pid,) = standby_pids(tmp_path)
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + PATIENCE_S
        while standby_pids(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        standby.keep(expected(environ))
        standby.keep(expected(environ))
        assert not standby_pids(tmp_path)
        assert standby.take(run_dir, 1, environ) is None
        standby.keep(expected(environ))
        (pid,) = standby_pids(tmp_path)
        taken = standby.take(run_dir, 1, environ)
        assert taken is not None
        assert taken.pid == pid
        assert taken.poll() is None
        taken.send(signal.SIGKILL)
        while (ended := taken.poll()) is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert ended == Exit(code=137, signal=9)
    finally:
        standby.close()


def test_a_standby_process_that_does_not_take_its_run_is_ended(tmp_path: Path) -> None:
    run_dir = RunDir.create(tmp_path / "runs" / "aaaaaaaaaaaa", spec_of(SMALLEST), spec_of(SMALLEST))
    environ = training_process.environment(devices=(), threads=1, credentials=tmp_path / "none")
    standby = Standby(tmp_path, take_s=0.2)
    try:
        standby.keep(expected(environ))
        (pid,) = standby_pids(tmp_path)
        os.kill(pid, signal.SIGSTOP)
        assert standby.take(run_dir, 1, environ) is None
        assert not standby_pids(tmp_path)
    finally:
        standby.close()


@pytest.mark.parametrize("mode", ["off", "queue"])
def test_a_process_waits_before_there_is_a_service(mode: StandbyMode, tmp_path: Path) -> None:
    if psutil.virtual_memory().available < FREE_BYTES:
        pytest.skip("no process waits where memory is short")
    data_dir = DataDir.open(tmp_path / "data")
    settings = RunServiceSettings(data_dir=data_dir.path, standby=mode, gpus=())
    first = FirstStandby.begin(settings, data_dir)
    try:
        pids = standby_pids(data_dir.path)
        assert len(pids) == (mode == "queue")
        began_s = time.monotonic()
        end_leftovers(data_dir)  # it is none
        assert time.monotonic() < began_s + TAKE_OVER_S
        assert standby_pids(data_dir.path) == pids
        if pids:
            wait_until(lambda: first.standby.cpu_s() > 0, "it computes")
    finally:
        first.standby.close()
        data_dir.close()
    assert not standby_pids(data_dir.path)
