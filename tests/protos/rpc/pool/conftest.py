"""The fixture of the tests of a pool."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from tests.protos.rpc.pool.world import TestClock, Wait, World


@pytest.fixture
def world() -> Iterator[World]:
    clock = TestClock()
    found = World(clock, Wait(60.0, clock=clock))
    yield found
    for pool in found.pools:
        pool.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("test-pool")]
