"""Adoption of attempts that an earlier service began."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.runs.data_dir import DataDir
from stillhouse.student_trainer.runs.store.store import Store
from stillhouse.student_trainer.runs.supervision import training_process
from tests.conftest import Models
from tests.student_trainer.config.specs import SMALLEST, cross_entropy_spec, spec_of
from tests.student_trainer.runs.api.caller import PATIENCE_S, stub_for, wait_ended, wait_step
from tests.support.processes import no_process_left
from tests.support.programs import WITHOUT_STANDBY, start_program, start_trainer
from tests.support.runs import wait_until


@pytest.mark.parametrize("with_log", [False, True])
def test_a_run_whose_process_was_never_started_is_queued_again(with_log: bool, tmp_path: Path) -> None:
    """State after a kill of the service between the store's commit and the start of the process."""
    data_dir = DataDir.open(tmp_path / "data")
    store = Store.open(data_dir.database_path)
    spec = spec_of(SMALLEST)
    store.create("aaaaaaaaaaaa", spec, spec, request_id="", version="1")
    attempt = store.begin_attempt("aaaaaaaaaaaa", ())
    store.close()
    if with_log:
        log = RunDir.create(data_dir.runs_path / "aaaaaaaaaaaa", spec, spec).log_path(attempt)
        log.parent.mkdir()
        log.touch()
    data_dir.close()
    with (
        no_process_left() as mark,
        start_trainer(
            tmp_path / "data",
            directory=tmp_path,
            options=["--cpu-slots", "0", "--gpus", ""],
            environment=mark,
        ) as program,
        stub_for(program.target) as stub,
    ):
        run = wait_ended(stub, "runs/aaaaaaaaaaaa")
    assert "--cpu-slots" in run.error.message  # it waited for a slot, and there is none
    assert list(run.attempts) == []


def _listens(service: psutil.Process, _: Path) -> bool:
    return any(each.status == "LISTEN" for each in service.net_connections())


def _holds_its_directory(service: psutil.Process, data_dir: Path) -> bool:
    """True before it has imported what serves."""
    return training_process.writes_below(service, data_dir / "lock")


@pytest.mark.model
@pytest.mark.parametrize("moment", [_holds_its_directory, _listens])
def test_a_service_that_is_told_to_end_before_it_has_adopted_runs_stops_them(
    moment: Callable[[psutil.Process, Path], bool], models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    data_dir = tmp_path / "data"
    spec = cross_entropy_spec(models.student, dataset_file, steps=1_000_000)
    with no_process_left() as mark:
        with (
            start_trainer(data_dir, directory=tmp_path / "1", environment=mark) as first,
            stub_for(first.target) as stub,
        ):
            name = stub.CreateRun(pb.CreateRunRequest(spec=spec)).name
            wait_step(stub, name, 1)
            first.process.kill()
            first.process.wait()
        # A service adopts no run before the standby processes of an earlier one have ended.
        left = subprocess.Popen(
            training_process.standby_command(data_dir),
            stdin=subprocess.PIPE,
            env={**os.environ, **training_process.environment_of_child(), **mark},
        )
        arguments = ["--data-dir", str(data_dir), "--listen", "127.0.0.1:0", "--stop-runs-on-exit"]
        with start_program(
            "trainer",
            ["stillhouse.student_trainer.runs", *arguments],
            directory=tmp_path / "2",
            environment={**mark, **WITHOUT_STANDBY},
            listens=False,
        ) as later:
            service = psutil.Process(later.pid)
            wait_until(lambda: moment(service, data_dir), moment.__name__)
            later.process.send_signal(signal.SIGTERM)
            left.communicate()
            code = later.process.wait(PATIENCE_S)
    store = Store.open(data_dir / "stillhouse.db")
    run = store.get(name.removeprefix("runs/"))
    store.close()
    assert (code, run.state) == (0, Run.STATE_STOPPED)
    assert run.latest_checkpoint
