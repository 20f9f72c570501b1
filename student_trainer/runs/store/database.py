"""Opens the service's database and migrates its schema; a single thread uses it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.pool import StaticPool

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.runs.store.postgres import (
    DatabaseInUseError,
    postgres_engine,
    postgres_url,
    to_stillhouse_error,
    without_password,
)

P = ParamSpec("P")
T = TypeVar("T")
BUSY_TIMEOUT_MS = 5000
"""Time that a statement waits for another program that locks the file, such as a backup."""


def open_database(place: Path | str) -> Engine:
    """The SQLite database at the path `place`, or the PostgreSQL one at that URL, created or migrated to this version's schema.

    Raises:
        StillhouseError: INVALID_CONFIG if it is of a later version, not a database, or unusable.
    """
    if isinstance(place, str):
        url = postgres_url(place)
        engine, where = postgres_engine(url), without_password(url)
    else:
        # One connection, since one thread uses it.
        engine = create_engine(
            f"sqlite:///{place}",
            poolclass=StaticPool,
            hide_parameters=True,
            connect_args={"check_same_thread": False},
        )
        event.listen(engine, "connect", _set_pragmas)
        where = str(place)
    try:
        _migrate(engine)
    except (CommandError, DBAPIError, DatabaseInUseError) as error:
        engine.dispose()
        known = _explained(error, engine)
        why = (
            known
            or f"{where} cannot be opened: {error}. If a later version of Stillhouse wrote it, start that version."
        )
        raise StillhouseError(Reason.INVALID_CONFIG, str(why)) from error
    return engine


def _set_pragmas(connection: Any, _record: object) -> None:
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        f"busy_timeout={BUSY_TIMEOUT_MS}",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _migrate(engine: Engine) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


@contextmanager
def transaction(engine: Engine) -> Iterator[Connection]:
    """One transaction.

    Raises:
        StillhouseError: DISK_FULL if the database cannot grow, DATABASE_UNREACHABLE if its server does not respond.
    """
    try:
        with engine.begin() as connection:
            yield connection
    except (DBAPIError, DatabaseInUseError) as error:
        known = _explained(error, engine)
        if known is None:
            raise
        raise known from error


def _explained(error: Exception, engine: Engine) -> StillhouseError | None:
    """Maps a database error to a StillhouseError; None if it is a bug."""
    if engine.dialect.name == "postgresql":
        return to_stillhouse_error(error, without_password(engine.url))
    if isinstance(error, OperationalError) and "full" in str(error.orig):
        return StillhouseError(
            Reason.DISK_FULL,
            "The disk of the service's data directory is full; free some space, as `stillhouse run delete` does.",
        )
    return None


class DatabaseThread:
    """Runs blocking calls sequentially, off the event loop."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Returns the function's result. A call that has begun completes even if the caller is cancelled."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Submits a call from another thread."""
        return self._executor.submit(function, *args, **kwargs)

    def close(self) -> None:
        """Waits for running calls."""
        self._executor.shutdown(wait=True)
