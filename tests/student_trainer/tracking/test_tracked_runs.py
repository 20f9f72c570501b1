"""Real runs with all trackers at once: stopped, resumed and completed as without them, also beside a server that hangs."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from stillhouse.protos.stillhouse.v1.run_pb2 import (
    CreateRunRequest,
    ResumeRunRequest,
    Run,
    StopRunRequest,
    TrackerSpec,
)
from stillhouse.student_trainer.run_dir import RunDir
from tests.conftest import Models
from tests.student_trainer.config.specs import cross_entropy_spec
from tests.student_trainer.runs.api.caller import stub_for, wait_ended, wait_step
from tests.student_trainer.tracking.conftest import Libraries
from tests.student_trainer.tracking.test_libraries import read
from tests.support.processes import no_process_left
from tests.support.programs import start_trainer
from tests.support.runs import wait_until

OFFLINE = ("tensorboard", "wandb", "trackio")
STEPS = 400


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(900)
def test_a_run_with_trackers_is_stopped_resumed_and_completed_beside_a_server_that_hangs(
    tracker_libraries: Libraries, models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        no_process_left() as mark,
    ):  # accepts, and answers nothing
        credentials = data / "credentials.toml"
        credentials.touch(mode=0o600)
        (tmp_path / "token").write_text("a-very-secret-key\n")
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        credentials.write_text(
            f'[lab]\ntracker = "mlflow"\nuri = "{uri}"\ntoken_file = "{tmp_path / "token"}"\n'
        )
        spec = cross_entropy_spec(models.student, dataset_file, steps=STEPS)
        spec.checkpoint.every_steps = 10
        spec.trackers.extend(TrackerSpec(kind=kind) for kind in OFFLINE)
        spec.trackers.add(kind="mlflow", credential="lab")
        environment = {**mark, "PYTHONPATH": str(tracker_libraries["wandb"])}
        with (
            start_trainer(
                data, directory=tmp_path, options=["--stop-runs-on-exit"], environment=environment
            ) as trainer,
            stub_for(trainer.target) as stub,
        ):
            run = stub.CreateRun(CreateRunRequest(spec=spec))
            wait_step(stub, run.name, 12)
            stub.StopRun(StopRunRequest(name=run.name))
            assert wait_ended(stub, run.name).state == Run.STATE_STOPPED
            stub.ResumeRun(ResumeRunRequest(name=run.name))
            assert wait_ended(stub, run.name).state == Run.STATE_COMPLETED
            left = data / "trackers"
            run_id = run.name.removeprefix("runs/")
            wait_until(
                lambda: {each.name for each in left.iterdir()} == {f"{run_id}.mlflow"}, "all trackers but one"
            )
            logs = [RunDir(data / run.name).log_path(number).read_text() for number in (1, 2)]
            assert "a-very-secret-key" not in "".join(logs) + trainer.log(1_000_000)
    folder = data / run.name / "trackers"
    for kind in ("wandb", "trackio"):
        told = read(kind, folder / kind, tracker_libraries[kind])
        assert [int(step) for step in told["losses"]] == list(range(1, STEPS + 1))
        assert all(len(values) == 1 for values in told["losses"].values())
    assert json.loads((folder / "tensorboard.json").read_text())["ended"] == "COMPLETED"
