"""Trackers beside real runs: they end with all of a run, fail apart from it, and get no secret but their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import (
    CreateRunRequest,
    DeleteRunRequest,
    Run,
    RunSpec,
    TrackerSpec,
)
from stillhouse.student_trainer.config.resources import TrackerConfig
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.runs.store.database import DatabaseThread
from stillhouse.student_trainer.runs.store.store import Store
from stillhouse.student_trainer.runs.supervision.journal_tail import ChangeNotifier
from stillhouse.student_trainer.runs.trackers import follower
from stillhouse.student_trainer.runs.trackers.access import SECRETS_VARIABLE, TrackerAccess
from stillhouse.student_trainer.runs.trackers.follower import Trackers
from tests.student_trainer.config.specs import spec_of
from tests.student_trainer.runs.api.caller import model_of_no_kind, refused, stub_for, wait_ended
from tests.support.programs import Program
from tests.support.runs import wait_until

SECRET = "a-very-secret-key"
SECTIONS = """
[lab]
token_file = "teacher.token"
[public]
tracker = "wandb"
token_file = "{token}"
[own]
tracker = "mlflow"
uri = "https://mlflow.example/base"
user = "ada"
token_file = "{token}"
ca = "/etc/ca.pem"
[open]
tracker = "trackio"
uri = "http://127.0.0.1:7860"
"""


@pytest.fixture
def access(tmp_path: Path) -> TrackerAccess:
    token = tmp_path / "token"
    token.write_text(f"{SECRET}\n")
    path = tmp_path / "credentials.toml"
    path.touch(mode=0o600)
    path.write_text(SECTIONS.format(token=token))
    return TrackerAccess(path)


def test_a_process_gets_the_secret_of_its_own_tracker_alone(
    access: TrackerAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "HF_TOKEN", "STILLHOUSE_TRAINER_DATABASE"):
        monkeypatch.setenv(name, "of the operator")
    offline = access.environment_of(TrackerConfig(kind="wandb"))
    assert "of the operator" not in offline.values()
    assert SECRET not in offline.values()
    public = access.environment_of(TrackerConfig(kind="wandb", credential="public"))
    assert (public["WANDB_API_KEY"], public[SECRETS_VARIABLE]) == (SECRET, "WANDB_API_KEY")
    own = access.environment_of(TrackerConfig(kind="mlflow", credential="own"))
    assert own["MLFLOW_TRACKING_URI"] == "https://mlflow.example/base"
    assert (own["MLFLOW_TRACKING_USERNAME"], own["MLFLOW_TRACKING_PASSWORD"]) == ("ada", SECRET)
    assert own["REQUESTS_CA_BUNDLE"] == "/etc/ca.pem"
    by_address = access.environment_of(TrackerConfig(kind="trackio", uri="http://127.0.0.1:7860"))
    assert by_address["TRACKIO_SERVER_URL"] == "http://127.0.0.1:7860"


@pytest.mark.parametrize(
    ("tracker", "field", "why"),
    [
        ({"kind": "wandb", "credential": "nothing"}, "credential", "no section"),
        ({"kind": "wandb", "credential": "lab"}, "credential", "no section"),  # a teacher's
        ({"kind": "wandb", "credential": "own"}, "credential", 'tracker = "wandb"'),
        ({"kind": "wandb", "credential": "public", "uri": "https://evil.example"}, "uri", "leave uri out"),
        ({"kind": "mlflow", "uri": "http://169.254.169.254"}, "uri", "names servers"),
        ({"kind": "mlflow", "uri": "file:///etc"}, "uri", "names servers"),
        ({"kind": "trackio", "uri": "https://mlflow.example/base"}, "uri", "names servers"),
    ],
)
def test_a_secret_goes_to_the_server_of_its_section_alone(
    access: TrackerAccess, tracker: dict[str, str], field: str, why: str
) -> None:
    with pytest.raises(StillhouseError, match=why) as caught:
        access.environment_of(TrackerConfig(**tracker))
    assert [each.field for each in caught.value.violations] == [field]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[a]\ntracker = "wandb"\ntoken = "x"\n', "'token'"),
        ('[a]\ntracker = "tensorboard"\n', "'tensorboard'"),
        ('[a]\ntracker = "mlflow"\n', "has no uri"),
        ('[a]\ntracker = "mlflow"\nuri = "sqlite:////tmp/x"\n', "no such address"),
        ('[a]\ntracker = "mlflow"\nuri = "https://u:p@a"\n', "no such address"),
        ('[a]\ntracker = "wandb"\ntoken_file = "/nowhere"\n', "cannot be read"),
        ("[a", "cannot be read"),
    ],
)
def test_a_wrong_section_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "credentials.toml"
    path.touch(mode=0o600)
    path.write_text(text)
    tracker = TrackerConfig(kind="mlflow" if "mlflow" in text else "wandb", credential="a")
    with pytest.raises(StillhouseError, match=why):
        TrackerAccess(path).environment_of(tracker)
    path.chmod(0o644)
    with pytest.raises(StillhouseError, match="chmod 600"):
        TrackerAccess(path).environment_of(tracker)


def failing_spec(root: Path, *trackers: Mapping[str, Any]) -> RunSpec:
    (root / "rows.jsonl").write_text('{"text": "a"}\n')
    values = {
        "student": {"model": str(model_of_no_kind(root))},
        "data": {"train": [{"path": str(root / "rows.jsonl")}]},
        "loss": {"terms": [{"weight": 0}], "hard_weight": 1},
        "trackers": list(trackers),
    }
    return spec_of(values)


def test_a_tracker_has_a_run_to_its_end_across_a_restart(
    trainer_service: Callable[..., Program], tmp_path: Path
) -> None:
    data = tmp_path / "trainer-data"
    first = trainer_service()
    with stub_for(first.target) as stub:
        nobodys = failing_spec(tmp_path, {"kind": "mlflow", "uri": "https://nobody.example"})
        with refused(Reason.INVALID_SPEC) as caught:
            stub.CreateRun(CreateRunRequest(spec=nobodys))
        [violation] = caught[0].violations
        # One without its library names that.
        assert violation.field in ("trackers[0].kind", "trackers[0].uri")
        tracked = failing_spec(tmp_path, {"kind": "tensorboard"})
        run = stub.CreateRun(CreateRunRequest(spec=tracked))
        run_path = data / run.name
        run_path.mkdir(exist_ok=True)
        (run_path / "trackers").write_text("in the way")  # no tracker can write
        ended = wait_ended(stub, run.name)
        assert ended.state == Run.STATE_FAILED
        assert ended.error.message.startswith("student.model")  # the run failed for its own reason
        wait_until(lambda: "tracker failed" in first.log(), "the tracker to fail")
    assert first.stop() == 0
    undone = data / "trackers"
    assert [each.name for each in undone.iterdir()] == [f"{run.name.removeprefix('runs/')}.tensorboard"]
    (run_path / "trackers").unlink()

    second = trainer_service()
    wait_until(lambda: not list(undone.iterdir()), "the tracker to be done")
    place = json.loads((run_path / "trackers" / "tensorboard.json").read_text())
    assert place["ended"] == "FAILED"
    with stub_for(second.target) as stub:
        log = RunDir(run_path).log_path(1).read_text()
        assert '"event": "tracker closed"' in log
        stub.DeleteRun(DeleteRunRequest(name=run.name))
    assert not run_path.exists()


class Followed:
    """Trackers of one run in a real store, whose processes are real; nobody trains."""

    def __init__(self, store: Store, folder: Path) -> None:
        self.spec = RunSpec(trackers=[TrackerSpec(kind="tensorboard")])
        self.store, self.runs = store, folder / "runs"
        self.db, self.changes = DatabaseThread(), ChangeNotifier()
        self.trackers = Trackers(
            store,
            self.db,
            self.changes,
            TrackerAccess(folder / "credentials.toml"),
            folder=folder / "trackers",
            runs=self.runs,
        )
        self.run_dir = RunDir(self.runs / "run-000001")

    async def begin(self) -> None:
        await self.trackers.start()
        run, _ = await self.db(
            self.store.create, "run-000001", self.spec, self.spec, request_id="", version="1"
        )
        self.trackers.follow(run)
        await self.db(self.store.begin_attempt, "run-000001", ())
        RunDir.create(self.run_dir.path, self.spec, self.spec)
        self.run_dir.write_control(1, stop=False)
        log = self.run_dir.log_path(1)
        log.parent.mkdir(parents=True)
        log.write_text("begun\n")
        await self.fail()

    async def fail(self) -> None:
        await self.db(
            self.store.end_attempt, "run-000001", 1, Run.STATE_FAILED, exit_code=1, signal=0, error=None
        )
        self.changes.notify("run-000001")

    async def done(self) -> None:
        while tasks := list(self.trackers._tasks.values()):
            await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)

    def process(self) -> psutil.Process | None:
        """The tracker's process."""
        children = psutil.Process().children()
        return next(
            (each for each in children if "stillhouse.student_trainer.tracking" in each.cmdline()), None
        )


@pytest.fixture
async def followed(tmp_path: Path) -> AsyncIterator[Followed]:
    store = Store.open(tmp_path / "runs.db")
    made = Followed(store, tmp_path)
    yield made
    await made.trackers.close()
    made.db.close()
    store.close()


async def test_a_process_that_dies_is_started_again(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "RETRIES_S", (0.05,))
    await followed.begin()
    await asyncio.to_thread(wait_until, lambda: followed.process() is not None, "a process")
    found = followed.process()
    assert found is not None
    os.kill(found.pid, signal.SIGKILL)
    await followed.done()
    assert (
        json.loads((followed.run_dir.path / "trackers" / "tensorboard.json").read_text())["ended"] == "FAILED"
    )


async def test_a_process_that_hangs_ends_with_the_service(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "STOP_S", 0.2)
    await followed.begin()
    await asyncio.to_thread(wait_until, lambda: followed.process() is not None, "a process")
    found = followed.process()
    assert found is not None
    os.kill(found.pid, signal.SIGSTOP)
    await followed.trackers.close()
    assert not found.is_running() or found.status() == psutil.STATUS_ZOMBIE
    assert (followed.trackers._folder / "run-000001.tensorboard").exists()  # for the next start


async def test_a_tracker_is_given_up_some_time_after_its_run(
    followed: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower, "RETRIES_S", (0.05,))
    monkeypatch.setattr(follower, "GIVEN_UP_S", -5.0)
    followed.spec.trackers[0].kind = "wandb"
    followed.spec.trackers[0].credential = "nowhere"
    await followed.begin()
    await followed.done()
    assert list(followed.trackers._folder.iterdir()) == []
