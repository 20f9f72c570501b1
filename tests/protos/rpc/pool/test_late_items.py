"""Late items of a pool go to a free replica that is far faster, once."""

from __future__ import annotations

import time

import pytest

from stillhouse.protos.rpc.pool import ledger, service_pool
from stillhouse.protos.rpc.pool.service_pool import Call, ServicePool
from tests.protos.rpc.pool.world import Member, World


def _with_answers(world: World, slow: Member, quick: Member) -> ServicePool[int, str, Member]:
    """A pool whose quick replica has answered as often as it takes to tell how long that takes it."""
    pool = world.pool(slow, quick, late=2.0)
    slow.gate.set()
    # Two items at a time, one for each.
    for number in range(0, 2 * ledger.LEAST_TIMED, 2):
        pool.put({number: 1, number + 1: 1})
        assert sorted(item_id for item_id, _ in world.results(pool, 2)) == [number, number + 1]
    slow.gate.clear()
    return pool


@pytest.mark.parametrize("is_alive", [True, False], ids=["slow", "stopped"])
def test_a_free_replica_gets_what_takes_another_one_too_long(world: World, is_alive: bool) -> None:
    slow, quick = world.member("slow", is_open=False, is_alive=is_alive), world.member("quick")
    told: list[tuple[str, int]] = []
    pool = _with_answers(world, slow, quick)
    pool._on_late = lambda target, number: told.append((target, number))
    pool.put({100: 1, 101: 1})
    assert world.results(pool, 1) == [(101, "quick")]
    for _ in range(20):
        assert pool.poll(world.wait) is None, "it is not late yet"
    world.clock.now += ledger.LEAST_LATE_S + 0.1
    # Long before it would be asked whether it is there.
    assert ledger.LEAST_LATE_S + 0.1 < service_pool.PING_AFTER_S
    assert world.results(pool, 1) == [(100, "quick")]
    assert told == [("slow", 1)]
    if not is_alive:
        world.until(pool, lambda: bool(world.losses))
        assert world.losses[0].num_requeued == 0
    slow.is_alive = True
    slow.gate.set()
    for _ in range(20):
        assert pool.poll(world.wait) is None, "the slow one's answer counts no more"
    assert slow.load.num_outstanding == quick.load.num_outstanding == 0


def test_no_replica_gets_items_of_another_that_is_as_quick(world: World) -> None:
    slow, quick = world.member("slow", is_open=False), world.member("quick")
    pool = _with_answers(world, slow, quick)
    # The quick one needed five seconds lately.
    quick.gate.clear()
    pool.put({100: 1, 101: 1})
    world.clock.now += 5.0
    quick.gate.set()
    assert world.results(pool, 1) == [(101, "quick")]
    world.clock.now += 4.0
    for _ in range(20):
        assert pool.poll(world.wait) is None
    slow.gate.set()
    assert world.results(pool, 1) == [(100, "slow")]


def test_an_item_that_takes_every_replica_long_is_answered(world: World) -> None:
    one, other = world.member("one", is_open=False), world.member("other")
    pool = _with_answers(world, one, other)
    needed_s, moves = 10 * ledger.LEAST_LATE_S, []

    def serve(member: Member, call: Call[int, str]) -> None:
        for item_id in call.take():
            until_s = world.clock.now + needed_s
            while world.clock.now < until_s:
                time.sleep(0.001)
            call.answer(item_id, member.target)

    pool._serve = serve
    pool._on_late = lambda target, _number: moves.append(target)
    pool.put({100: 1})
    world.clock.step_s = 0.05
    began_s = world.clock.now
    try:
        while (result := pool.poll(world.wait)) is None:
            assert world.clock.now - began_s < 10 * needed_s, "it goes to and fro"
    finally:
        world.clock.now += 2 * needed_s
    assert result[0] == 100
    assert 1 < len(moves) < 5
