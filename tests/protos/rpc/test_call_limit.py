"""Call limit: a client's share is a multiple of what it leaves free."""

from __future__ import annotations

from stillhouse.protos.rpc.call_limit import may_hold


def test_a_client_alone_may_hold_three_quarters() -> None:
    assert may_hold(0, 1, 1)
    assert not may_hold(0, 1, 2)
    held = next(each for each in range(100) if not may_hold(each, 100 - each, 1))
    assert held == 75
