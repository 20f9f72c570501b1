"""Opens the service's database and moves its schema forward; one thread alone talks to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import StaticPool

from protos.errors import Reason, StillhouseError

P = ParamSpec("P")
T = TypeVar("T")
BUSY_TIMEOUT_MS = 5000
"""Time that a statement waits for another program that reads the file, such as a backup."""


def open_database(path: Path) -> Engine:
    """The SQLite database at `path`, made or migrated to this version's schema.

    Raises:
        StillhouseError: INVALID_CONFIG if the file is of a later version, or is no database.
    """
    # One connection, since one thread uses it.
    engine = create_engine(
        f"sqlite:///{path}", poolclass=StaticPool, connect_args={"check_same_thread": False}
    )
    event.listen(engine, "connect", _set_pragmas)
    try:
        _migrate(engine)
    except (CommandError, DatabaseError) as error:
        engine.dispose()
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"{path} cannot be opened: {error}. If a later version of Stillhouse wrote it, start that version.",
        ) from error
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


class DatabaseThread:
    """Runs blocking calls one after the other, off the event loop."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `function` returns. A call that has begun is finished even if the caller is cancelled.

        Raises:
            StillhouseError: DISK_FULL if the database cannot grow.
        """
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, lambda: function(*args, **kwargs))
        except OperationalError as error:
            if "full" in str(error.orig):
                raise StillhouseError(
                    Reason.DISK_FULL, "The disk of the service's data directory is full; free some space."
                ) from error
            raise

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """The same for a caller in a thread of its own, which waits by itself."""
        return self._executor.submit(function, *args, **kwargs)

    def close(self) -> None:
        """Wait for the calls that were begun."""
        self._executor.shutdown(wait=True)
