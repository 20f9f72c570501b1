"""Store on SQLite and PostgreSQL: one contract for both, migrations, and specifics of each."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import insert

from stillhouse.protos.errors import StillhouseError
from stillhouse.student_trainer.runs.data_dir import DataDir
from stillhouse.student_trainer.runs.store.database import DatabaseThread, open_database
from stillhouse.student_trainer.runs.store.schema import dataset_versions, datasets, metadata
from stillhouse.student_trainer.runs.store.store import Store
from tests.student_trainer.runs.store.dataset_contract import (  # noqa: F401
    DatasetContract,
    test_other_names_are_no_datasets,
)
from tests.student_trainer.runs.store.listing_contract import ListingContract
from tests.student_trainer.runs.store.store_contract import StoreContract, new_run
from tests.support.postgres import Postgres


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """An empty database: a file, or the URL of one on a real server."""
    if request.param == "sqlite":
        return tmp_path / "stillhouse.db"
    server: Postgres = request.getfixturevalue("postgres")
    return server.empty()


@pytest.fixture
def store(place: Path | str) -> Iterator[Store]:
    opened = Store.open(place)
    yield opened
    opened.close()


class TestStore(StoreContract):
    pass


class TestListing(ListingContract):
    pass


class TestDatasets(DatasetContract):
    pass


def test_migrations_make_the_schema_that_the_code_uses(place: Path | str) -> None:
    engine = open_database(place)
    with engine.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_a_page_of_a_thousand_datasets_is_quick(place: Path | str) -> None:
    engine = open_database(place)
    digests = [f"{number:064x}" for number in range(1000)]
    file = {"suffix": ".jsonl", "file_name": "a.jsonl", "size_bytes": 1, "create_us": 1}
    version = {
        "dataset_id": "many",
        "file_name": "a.jsonl",
        "num_rows": 1,
        "num_tokens": 0,
        "owner": "",
        "create_us": 1,
    }
    with engine.begin() as db:
        db.execute(insert(datasets), [{"sha256": each, **file} for each in digests])
        numbered = [{"sha256": each, "version": at, **version} for at, each in enumerate(digests, start=1)]
        db.execute(insert(dataset_versions), numbered)
    engine.dispose()
    store = Store.open(place)
    began_s = time.perf_counter()
    page, following = store.datasets.page("", before=None, limit=500)
    rest, end = store.datasets.page("many", before=following, limit=500)
    assert time.perf_counter() - began_s < 1
    assert [each.name for each in (*page, *rest)] == [f"datasets/many@{at}" for at in range(1000, 0, -1)]
    assert end is None
    store.close()


def test_sqlite_loses_nothing_that_was_committed(tmp_path: Path) -> None:
    engine = open_database(tmp_path / "stillhouse.db")
    with engine.begin() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
    engine.dispose()


def test_a_reopened_store_is_unchanged(place: Path | str) -> None:
    store = Store.open(place)
    run = new_run(store)
    store.close()
    store = Store.open(place)
    assert store.get("aaaaaaaaaaaa") == run
    store.close()


def test_a_database_of_a_later_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stillhouse.db"
    Store.open(path).close()
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(StillhouseError, match="later version"):
        Store.open(path)


def test_a_file_other_than_a_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "stillhouse.db"
    path.write_bytes(b"not a database at all, but long enough to have a header of one" * 20)
    with pytest.raises(StillhouseError, match="cannot be opened"):
        Store.open(path)


def test_a_data_directory_has_one_service_and_one_layout(tmp_path: Path) -> None:
    opened = DataDir.open(tmp_path / "data")
    with pytest.raises(StillhouseError, match="Another run service"):
        DataDir.open(tmp_path / "data")
    opened.close()
    (tmp_path / "data" / "VERSION").write_text("99\n")
    with pytest.raises(StillhouseError, match="layout '99'"):
        DataDir.open(tmp_path / "data")


def test_secrets_that_others_can_read_are_refused(tmp_path: Path) -> None:
    secrets = tmp_path / "credentials.toml"
    secrets.touch(mode=0o640)
    with pytest.raises(StillhouseError, match="chmod 600"):
        DataDir.open(tmp_path)
    secrets.chmod(0o600)
    DataDir.open(tmp_path).close()


async def test_the_database_thread_completes_running_calls() -> None:
    thread = DatabaseThread()
    done: list[int] = []
    await thread(done.append, 1)
    thread.close()
    assert done == [1]
