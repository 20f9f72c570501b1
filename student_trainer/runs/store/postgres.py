"""PostgreSQL store: URL, single connection and the lock against a second service; passwords are never shown."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, InterfaceError, OperationalError
from sqlalchemy.pool import QueuePool

from stillhouse.protos.errors import Reason, StillhouseError

SCHEMES = frozenset({"postgresql", "postgres", "postgresql+psycopg"})
RETRY_S = 2.0
DISK_FULL = "53100"
"""SQLSTATE of a full disk."""
_KEEPALIVES = {"idle": 5, "interval": 3, "count": 3}
"""TCP keepalive of both sides: idle seconds, interval in seconds, and number of failed probes."""
_SETTINGS = {
    "application_name": "stillhouse-trainer",
    "connect_timeout": 5,
    # A server that vanished is noticed within about 15 s.
    **{f"keepalives_{name}": value for name, value in _KEEPALIVES.items()},
    "tcp_user_timeout": 15_000,
}
"""Connection defaults; the URL overrides them."""
_LOCK = "SELECT pg_try_advisory_lock(hashtext('stillhouse runs'), hashtext(coalesce(current_schema(), '')))"


class DatabaseInUseError(Exception):
    """Another service uses the database."""


def postgres_url(text: str) -> URL:
    """Parses the URL of --database.

    Raises:
        StillhouseError: INVALID_CONFIG for anything but PostgreSQL's, or without its driver. The text is not repeated: it
            may hold a password.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        url = None
    if url is None or url.drivername not in SCHEMES or not url.database:
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            "--database is not a URL of a PostgreSQL database such as postgresql://user@host/name. Without it the store is a "
            "file in --data-dir.",
        )
    if find_spec("psycopg") is None:
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            "--database needs PostgreSQL's driver, which is not installed; run `pip install 'stillhouse[postgres]'`.",
        )
    return url.set(drivername="postgresql+psycopg")


def without_password(url: URL) -> str:
    """The URL for display, without password and query, which may hold another."""
    return url.set(drivername="postgresql", query={}).render_as_string(hide_password=True)


def postgres_engine(url: URL) -> Engine:
    """An engine with one connection, since one thread uses it; a broken one is replaced on next use."""
    settings = {name: value for name, value in _SETTINGS.items() if name not in url.query}
    engine = create_engine(
        url,
        poolclass=QueuePool,
        pool_size=1,
        max_overflow=0,
        pool_pre_ping=True,
        hide_parameters=True,
        connect_args=settings,
    )
    event.listen(engine, "connect", _acquire)
    return engine


def _acquire(connection: Any, _record: object) -> None:
    """Locks the database for this service while the connection lives, with keepalives on the server's side.

    Raises:
        DatabaseInUseError: another service holds it.
    """
    import psycopg

    try:
        with connection.cursor() as cursor:
            for name, value in _KEEPALIVES.items():
                cursor.execute(f"SET tcp_keepalives_{name} = {value}")
            cursor.execute(_LOCK)
            (taken,) = cursor.fetchone()
        connection.commit()
    except psycopg.Error as error:
        connection.close()
        raise OperationalError(_LOCK, None, error) from error
    if not taken:
        connection.close()
        raise DatabaseInUseError


def to_stillhouse_error(error: Exception, where: str) -> StillhouseError | None:
    """Maps an error of the database at `where` to a StillhouseError; None if it is a bug."""
    if isinstance(error, DatabaseInUseError):
        return StillhouseError(
            Reason.DATABASE_UNREACHABLE,
            f"Another run service uses the database {where}; stop it, or give this one its own database or schema.",
            retry_after_s=RETRY_S,
        )
    if isinstance(error, OperationalError) and getattr(error.orig, "sqlstate", None) == DISK_FULL:
        return StillhouseError(
            Reason.DISK_FULL, f"The disk of the database {where} is full; free some space there."
        )
    if isinstance(error, OperationalError | InterfaceError):
        said = " ".join(str(error.orig).split())
        return StillhouseError(
            Reason.DATABASE_UNREACHABLE,
            f"The run service cannot use its database {where} ({said[:300]}). Runs continue meanwhile; check that the database "
            "responds, then retry.",
            retry_after_s=RETRY_S,
        )
    return None
