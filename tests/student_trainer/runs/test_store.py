"""The SQLite store: the contract of stores, its file, and its migrations."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from protos.errors import StillhouseError
from student_trainer.runs.data_dir import DataDir
from student_trainer.runs.database import DatabaseThread, open_database
from student_trainer.runs.schema import metadata
from student_trainer.runs.store import Store
from tests.student_trainer.runs.store_contract import StoreContract, new_run


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "stillhouse.db")
    yield opened
    opened.close()


class TestSqlite(StoreContract):
    pass


def test_migrations_make_the_schema_that_the_code_uses(tmp_path: Path) -> None:
    engine = open_database(tmp_path / "stillhouse.db")
    with engine.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar_one() == 2
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar_one() == 1
    engine.dispose()


def test_a_store_is_what_it_was_after_opening_it_again(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "stillhouse.db")
    run = new_run(store)
    store.close()
    store = Store.open(tmp_path / "stillhouse.db")
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


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
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


async def test_the_database_thread_finishes_what_it_began() -> None:
    thread = DatabaseThread()
    done: list[int] = []
    assert await thread(done.append, 1) is None
    thread.close()
    assert done == [1]
