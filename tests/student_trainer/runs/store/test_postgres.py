"""Run service on PostgreSQL: outages cost runs nothing, passwords stay secret, a single service uses a database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from stillhouse.protos.errors import Reason, StillhouseError, from_rpc_error
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.runs.store.store import Store
from stillhouse.student_trainer.runs.supervision.journal_tail import JournalTail
from stillhouse.student_trainer.runs.supervision.training_process import environment
from tests.conftest import Models
from tests.student_trainer.config.specs import cross_entropy_spec
from tests.student_trainer.runs.api.caller import stub_for, wait_ended, wait_step
from tests.student_trainer.runs.store.store_contract import SPEC, new_run, steps_of
from tests.support.postgres import PASSWORD, Postgres
from tests.support.programs import Program, ProgramError
from tests.support.runs import wait_until


@pytest.fixture
def used_postgres(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> Iterator[Postgres]:
    """The server, emptied; restarted after the test."""
    monkeypatch.setenv("STILLHOUSE_TRAINER_DATABASE", postgres.empty())
    yield postgres
    if not postgres.runs:
        postgres.start()


def secrets_in(text: str) -> bool:
    return PASSWORD in text or PASSWORD.replace(" ", "%20") in text


def test_a_second_service_does_not_get_the_database(postgres: Postgres) -> None:
    url = postgres.empty()
    first = Store.open(url)
    with pytest.raises(StillhouseError, match="Another run service uses the database") as caught:
        Store.open(url)
    assert not secrets_in(caught.value.message)
    first.close()
    Store.open(url).close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://ada:secret@host/db", "not a URL of a PostgreSQL database"),
        (
            "postgresql://ada:secret@127.0.0.1:1/db",
            "cannot use its database postgresql://ada:\\*\\*\\*@127.0.0.1:1/db",
        ),
        ("postgresql://ada:secret@127.0.0.1:x/db", "not a URL of a PostgreSQL database"),
        ("stillhouse.db", "not a URL of a PostgreSQL database"),
    ],
)
def test_a_database_that_cannot_be_used_is_refused_without_its_password(url: str, says: str) -> None:
    with pytest.raises(StillhouseError, match=says) as caught:
        Store.open(url)
    assert caught.value.reason is Reason.INVALID_CONFIG
    assert "secret" not in caught.value.message


def test_training_processes_do_not_get_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_TRAINER_DATABASE", "postgresql://ada:secret@host/db")
    monkeypatch.setenv("PGPASSWORD", "secret")
    given = environment(devices=(), threads=1, credentials=Path("credentials.toml"))
    assert not any("secret" in value for value in given.values())


def test_a_commit_with_a_lost_connection_is_recorded_once(postgres: Postgres, tmp_path: Path) -> None:
    store = Store.open(postgres.empty())
    new_run(store)
    store.begin_attempt("aaaaaaaaaaaa", ())
    run_dir = RunDir.create(tmp_path / "run", SPEC, SPEC)
    run_dir.write_control(1, stop=False)
    with run_dir.open_attempt(1) as attempt:
        for step in (1, 2):
            attempt.report_metrics(step, {"train/loss": 0.5})
    tail, record = JournalTail(store, "aaaaaaaaaaaa", run_dir, 1), store.record

    def record_and_lose_the_answer(*arguments: Any) -> None:
        record(*arguments)
        raise StillhouseError(Reason.DATABASE_UNREACHABLE, "The answer was lost.")

    store.record = record_and_lose_the_answer  # type: ignore[method-assign,assignment]
    with pytest.raises(StillhouseError):
        tail.ingest()
    store.record = record  # type: ignore[method-assign]
    while tail.ingest():
        pass
    assert steps_of(store) == [1, 2]
    store.close()


@pytest.mark.model
def test_runs_continue_while_the_database_is_unreachable(
    trainer_service: Callable[..., Program],
    used_postgres: Postgres,
    models: Models,
    dataset_file: Path,
    tmp_path: Path,
) -> None:
    program = trainer_service()
    spec = cross_entropy_spec(models.student, dataset_file, steps=1_000_000)
    with stub_for(program.target) as stub:
        name = stub.CreateRun(pb.CreateRunRequest(spec=spec)).name
        wait_step(stub, name, 2)
        used_postgres.stop()
        with pytest.raises(grpc.RpcError) as caught:
            stub.StopRun(pb.StopRunRequest(name=name), timeout=60)
        error = from_rpc_error(caught.value, target=program.target, service="trainer")
        assert error.reason is Reason.DATABASE_UNREACHABLE, error
        assert "Runs continue meanwhile" in error.message
        assert not secrets_in(error.message)
        metrics = tmp_path / "trainer-data" / name / "metrics.jsonl"
        size = metrics.stat().st_size
        wait_until(lambda: metrics.stat().st_size > size, "the run takes steps without the database")
        used_postgres.start()
        wait_until(lambda: answers(stub, name), "the service has its database again")
        stub.StopRun(pb.StopRunRequest(name=name))
        run = wait_ended(stub, name)
        assert run.state == Run.STATE_STOPPED
        request = pb.QueryMetricsRequest(name=name, keys=["train/loss"], max_points=20_000)
        (losses,) = stub.QueryMetrics(request).series
        assert list(losses.steps) == list(range(1, run.progress.step + 1))
    log = program.log(10_000_000)
    assert "journals not read" in log
    assert not secrets_in(log)
    assert "Traceback" not in log
    everything = [path.read_bytes() for path in (tmp_path / "trainer-data").rglob("*") if path.is_file()]
    assert not any(PASSWORD.encode() in content for content in everything)


def answers(stub: object, name: str) -> bool:
    try:
        stub.GetRun(pb.GetRunRequest(name=name), timeout=60)  # type: ignore[attr-defined]
    except grpc.RpcError:
        return False
    return True


@pytest.mark.model
def test_a_service_with_an_unreachable_database_does_not_start(
    tmp_path: Path, trainer_service: Callable[..., Program]
) -> None:
    with pytest.raises(ProgramError, match="cannot use its database") as caught:
        trainer_service("--database", "postgresql://ada:secret@127.0.0.1:1/db")
    assert "secret" not in str(caught.value)
