"""A PostgreSQL server for the tests of the store and of the run service."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from tests.support.postgres import PACKAGE, Postgres, running_postgres


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A running server."""
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip(f"{PACKAGE} is not installed")
    with running_postgres() as server:
        yield server
