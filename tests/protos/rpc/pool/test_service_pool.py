"""A pool of replicas: who gets which item, what becomes of it when replicas are lost, and how waiting ends."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.pool import service_pool
from stillhouse.protos.rpc.pool.bounded_wait import MAX_BACKOFF_S, backoff_s
from stillhouse.protos.rpc.pool.ledger import REFUSED_RETRY_S
from stillhouse.protos.rpc.pool.load_balancing import Load, earliest_finish
from stillhouse.protos.rpc.pool.replica import PoolOptions
from stillhouse.protos.rpc.pool.service_pool import Call, ServicePool
from tests.protos.rpc.pool.world import Member, Stopped, World, lost


def test_a_faster_replica_gets_more_and_old_measurements_fade() -> None:
    now = 0.0
    loads, speeds = [Load(now_s=lambda: now), Load(now_s=lambda: now)], (30, 10)
    given = [0, 0]
    for _ in range(200):
        now += 1.0
        for load, speed in zip(loads, speeds, strict=True):
            for _ in range(min(speed, load.num_outstanding)):
                load.complete(1)
        while loads[0].outstanding_cost + loads[1].outstanding_cost < 80:
            index = earliest_finish(loads, 1)
            loads[index].assign(1)
            given[index] += 1
    assert given[0] == pytest.approx(3 * given[1], rel=0.2)
    for load in loads:
        while load.num_outstanding:
            load.withdraw(1)
    now += 1000.0
    first = earliest_finish(loads, 1)
    loads[first].assign(1)
    assert {first, earliest_finish(loads, 1)} == {0, 1}


def test_an_item_goes_to_the_replica_that_is_expected_to_finish_it_first(world: World) -> None:
    busy, idle = world.member("busy", is_open=False), world.member("idle", is_open=False)
    busy.load.assign(5)  # by another pool
    pool = world.pool(busy, idle, cost_of=lambda item: item)
    pool.put({0: 3, 1: 4, 2: 1})
    for member in (busy, idle):
        member.gate.set()
    assert dict(world.results(pool, 3)) == {0: "idle", 1: "idle", 2: "busy"}
    busy.load.withdraw(5)
    assert (busy.load.outstanding_cost, idle.load.outstanding_cost) == (0, 0)


def test_what_a_lost_replica_left_is_answered_by_another_exactly_once(world: World) -> None:
    first, second = world.member("first", is_open=False), world.member("second", is_open=False)
    pool = world.pool(first, second)
    pool.put(dict.fromkeys(range(10), 1))
    world.until(pool, lambda: len(first.sent) + len(second.sent) == 10)
    left = set(first.sent[3:])
    first.breaks = lambda item: lost() if item in left else None
    first.gate.set()
    second.gate.set()
    results = world.results(pool, 10)
    assert sorted(item_id for item_id, _ in results) == list(range(10))
    assert {item_id for item_id, answer in results if answer == "first"}.isdisjoint(left)
    assert pool.num_sent == 10 + len(left)
    assert first.load.num_returned == len(left)
    assert (first.load.num_outstanding, second.load.num_outstanding) == (0, 0)
    assert [(each.target, each.num_requeued, each.was_open) for each in world.losses][:1] == [
        ("first", len(left), True)
    ]
    assert pool.poll(world.wait) is None


def test_results_are_got_as_they_come_or_in_the_order_of_the_caller(world: World) -> None:
    pool = world.pool(world.member("only"))
    pool.put({3: 1, 1: 1, 2: 1})
    assert [pool.get_result(item_id, world.wait) for item_id in (2, 3, 1)] == ["only"] * 3
    pool.put({6: 1, 5: 1, 4: 1})
    assert [item_id for item_id, _ in world.results(pool, 3)] == [4, 5, 6], "lower ids are sent first"
    assert not pool.is_done
    pool.complete()
    world.until(pool, lambda: pool.is_done)


def test_a_poison_item_fails_after_its_attempts_with_its_error(world: World) -> None:
    member = world.member("only", breaks=lambda item: lost(message="the engine died") if item == 2 else None)
    pool = world.pool(member, max_attempts=3)
    world.clock.step_s = 0.1
    pool.put(dict.fromkeys(range(3), 1))
    results = dict(world.results(pool, 3))
    assert (results[0], results[1], results[2].message) == ("only", "only", "the engine died")
    assert member.sent.count(2) == 3
    pool.put({2: 1})
    with pytest.raises(StillhouseError, match="the engine died"):
        pool.get_result(2, world.wait)


def test_errors_that_do_not_count_cost_an_item_no_attempt(world: World) -> None:
    left = [lost(Reason.TOO_MANY_CALLS, "busy")] * 5
    pool = world.pool(
        world.member("only", breaks=lambda _: left.pop() if left else None),
        max_attempts=2,
        counts=lambda error: error.reason is not Reason.TOO_MANY_CALLS,
    )
    world.clock.step_s = 0.1
    pool.put({0: 1})
    assert (pool.get_result(0, world.wait), left) == ("only", [])


def test_one_item_is_asked_again_while_its_call_continues(world: World) -> None:
    asked: list[int] = []

    def serve(member: Member, call: Call[int, str]) -> None:
        for item_id in call.take():
            asked.append(item_id)
            if asked == [0, 1]:
                assert call.retry(item_id, lost())
            else:
                call.answer(item_id, "answered")

    settings: PoolOptions[int] = PoolOptions(name="test-pool", max_calls=2)
    pool: ServicePool[int, str, Member] = ServicePool(
        [world.member("only")], serve, settings, on_lost=world.losses.append, clock=world.clock
    )
    world.pools.append(pool)
    pool.put(dict.fromkeys(range(3), 1))
    assert [item_id for item_id, _ in world.results(pool, 2)] == [0, 2]
    world.until(pool, lambda: bool(world.losses))
    world.clock.now += 1.0
    assert world.results(pool, 1) == [(1, "answered")]
    assert asked == [0, 1, 2, 1]


def test_patience_ends_with_one_error_once_no_replica_answers(world: World) -> None:
    pool = world.pool(*(world.member(name, probe_error=lost(), is_ready=False) for name in "ab"))
    world.clock.step_s = 0.1
    pool.put({0: 1})
    with pytest.raises(StillhouseError, match=r"^the line is cut$"):
        pool.get_result(0, world.wait)
    assert 60.0 < world.clock.now < 65.0


def test_waiting_counts_from_the_loss_of_the_last_replica(world: World) -> None:
    member = world.member("only", is_open=False)
    pool = world.pool(member)
    pool.put({0: 1})
    world.until(pool, lambda: bool(member.sent))
    world.clock.now += 1000.0  # a long item is no silence
    member.breaks, member.probe_error = lambda _: lost(), lost()
    member.gate.set()
    world.until(pool, lambda: bool(world.losses))
    world.clock.now += 59.0
    assert pool.poll(world.wait) is None
    world.clock.now += 2.0
    with pytest.raises(StillhouseError):
        pool.poll(world.wait)


def test_silence_counts_as_loss_where_the_pool_says_so(world: World) -> None:
    pool = world.pool(world.member("only", is_open=False), silence_s=30.0)
    pool.put({0: 1})
    world.clock.now += 29.0
    assert pool.poll(world.wait) is None
    world.clock.now += 32.0
    with pytest.raises(TimeoutError, match="no service answered for 60 s"):
        pool.poll(world.wait)


def test_a_stop_ends_waiting_at_once(world: World) -> None:
    pool = world.pool(world.member("only", is_open=False))
    pool.put({0: 1})
    assert pool.poll(world.wait, 0) is None
    world.wait.is_stopped = True
    with pytest.raises(Stopped):
        pool.get_result(0, world.wait)
    with pytest.raises(Stopped):
        world.wait.pause(lost())
    assert world.clock.now == 0.0


def test_a_replaced_credential_is_read_again_before_each_try(world: World) -> None:
    credential = ["old"]
    used: list[str] = []

    class Guarded(Member):
        def probe(self) -> None:
            used.append(credential[0])
            if credential[0] == "old":
                raise lost(Reason.UNAUTHENTICATED, "the token is revoked")

    member = Guarded("only", Load(now_s=world.clock.now_s))
    member.gate.set()
    pool = world.pool(member, is_passing=lambda *_: True)
    pool.put({0: 1})
    world.until(pool, lambda: bool(world.losses))
    assert pool.last_error is not None
    assert pool.last_error.message == "the token is revoked"
    credential[0] = "new"
    world.clock.now += MAX_BACKOFF_S
    assert pool.get_result(0, world.wait) == "only"
    assert used[-1] == "new"


def test_a_replica_that_comes_back_is_probed_and_used_again(world: World) -> None:
    first, second = world.member("first", breaks=lambda _: lost()), world.member("second")
    first.probe_error = lost()
    pool = world.pool(first, second)
    pool.put({0: 1, 1: 1})
    assert {answer for _, answer in world.results(pool, 2)} == {"second"}
    world.clock.now += 2 * MAX_BACKOFF_S
    first.probe_error, first.breaks = None, lambda _: None
    before = first.num_probes
    world.clock.step_s = 0.1
    world.until(pool, lambda: first.num_probes > before)
    pool.put(dict.fromkeys(range(2, 12), 1))
    assert {answer for _, answer in world.results(pool, 10)} == {"first", "second"}


def test_an_unusable_replica_is_left_to_the_others_and_an_error_once_all_are(world: World) -> None:
    wrong = lost(Reason.TEACHER_CHANGED, "another model.")
    first, second = world.member("first", probe_error=wrong), world.member("second")
    pool = world.pool(first, second)
    pool.put({0: 1, 1: 1})
    assert {answer for _, answer in world.results(pool, 2)} == {"second"}
    world.until(pool, lambda: bool(world.losses))
    assert (world.losses[0].is_passing, world.losses[0].pause_s) == (False, REFUSED_RETRY_S)
    second.probe_error = lost(Reason.CAPABILITY, "no adapters.")
    pool.put({2: 1})
    with pytest.raises(
        StillhouseError, match=r"^None of the 2 services can be used. another model. no adapters.$"
    ):
        pool.get_result(2, world.wait)


def test_what_looks_like_a_bug_is_tried_a_few_times(world: World) -> None:
    member = world.member("only", breaks=lambda _: lost(Reason.INTERNAL, "a bug"))
    pool = world.pool(member, is_passing=lambda _, num_same: num_same < 5)
    world.clock.step_s = 0.1
    pool.put({0: 1})
    with pytest.raises(StillhouseError, match="a bug"):
        pool.get_result(0, world.wait)
    assert len(member.sent) == 5


def test_an_unexpected_exception_of_a_call_is_raised_where_results_are_got(world: World) -> None:
    def serve(member: Member, call: Call[int, str]) -> None:
        raise ZeroDivisionError

    pool: ServicePool[int, str, Member] = ServicePool(
        [world.member("only")], serve, PoolOptions[int](name="test-pool"), clock=world.clock
    )
    world.pools.append(pool)
    pool.put({0: 1})
    with pytest.raises(ZeroDivisionError):
        pool.get_result(0, world.wait)


def test_the_window_bounds_what_is_in_flight_and_what_is_not_got(world: World) -> None:
    first, second = world.member("first", is_open=False), world.member("second", is_open=False)
    pool = world.pool(first, second, window=4)
    read: list[int] = []

    def feed() -> None:
        for number in range(20):
            read.append(number)
            if not pool.put_when_room(number, 1):
                return

    reader = threading.Thread(target=feed, daemon=True)
    reader.start()
    world.until(pool, lambda: len(read) == 9)
    assert (first.load.num_outstanding, second.load.num_outstanding) == (4, 4)
    assert not pool.has_room(1)
    for member in (first, second):
        member.gate.set()
    for number in range(1, 13):
        world.results(pool, 1)
        assert len(read) <= number + 9
    world.results(pool, 8)
    reader.join()


def test_items_of_a_chunk_go_to_one_replica_together(world: World) -> None:
    first, second = world.member("first", is_open=False), world.member("second", is_open=False)
    pool = world.pool(first, second, chunk=4)
    pool.put(dict.fromkeys(range(8), 1))
    world.until(pool, lambda: len(first.sent) + len(second.sent) == 8)
    assert {tuple(first.sent), tuple(second.sent)} == {(0, 1, 2, 3), (4, 5, 6, 7)}


def test_a_stream_gets_items_as_they_are_put_and_ends_once_the_pool_is_complete(world: World) -> None:
    num_calls = 0

    def serve(member: Member, call: Call[int, str]) -> None:
        nonlocal num_calls
        num_calls += 1
        while (sent := call.next_item()) is not None:
            item_id, item = sent
            assert call.item(item_id) == item
            call.answer(item_id, str(item))
            call.answer(item_id, "late")
            assert call.item(item_id) is None

    pool: ServicePool[int, str, Member] = ServicePool(
        [world.member("only")], serve, PoolOptions[int](name="test-pool"), clock=world.clock
    )
    world.pools.append(pool)
    for number in range(5):
        pool.put({number: number})
        assert pool.get_result(number, world.wait) == str(number)
    assert not pool.is_done
    pool.complete()
    world.until(pool, lambda: pool.is_done)
    assert num_calls == 1


def test_a_silent_replica_is_pinged_and_its_items_go_to_another_if_it_hangs(world: World) -> None:
    hung, well = world.member("hung", is_open=False), world.member("well")
    pool = world.pool(hung, well)
    pool.put({0: 1, 1: 1})
    assert world.results(pool, 1) == [(1, "well")]
    world.clock.now += service_pool.PING_AFTER_S + 1.0
    for _ in range(20):
        assert pool.poll(world.wait) is None, "it is busy and says so"
    hung.is_alive = False
    world.clock.now += service_pool.PING_AFTER_S + 1.0
    assert world.results(pool, 1) == [(0, "well")]
    assert "has answered nothing for 10 s" in world.losses[0].error.message
    assert "no reaction" in world.losses[0].error.message


def test_what_comes_first_is_done_once_before_an_answer_can_be_got(world: World) -> None:
    member = world.member("only")
    pool = world.pool(member)
    told: list[int] = []

    def serve(replica: Member, call: Call[int, str]) -> None:
        for item_id in call.take():
            call.answer(item_id, replica.target, first=partial(told.append, item_id))
            call.answer(item_id, replica.target, first=partial(told.append, item_id))

    pool._serve = serve
    pool.put({0: 1, 1: 1})
    assert pool.get_result(1, world.wait) == "only"
    assert world.results(pool, 1) == [(0, "only")]
    assert told == [0, 1]


def test_an_answer_that_comes_as_the_pool_closes_is_dropped(world: World) -> None:
    member = world.member("only")
    pool = world.pool(member)
    closed: list[threading.Thread] = []

    def serve(replica: Member, call: Call[int, str]) -> None:
        (item_id,) = call.take()
        closing = threading.Thread(target=pool.close)

        def close() -> None:
            closing.start()
            while not pool._is_closed:
                pass
            closed.append(closing)

        call.answer(item_id, replica.target, first=close)

    pool._serve = serve
    pool.put({0: 1})
    world.until(pool, lambda: bool(closed))
    closed[0].join(30)
    assert pool._ledger.failure is None


def test_closing_cancels_calls_and_leaves_no_thread_and_no_load(world: World) -> None:
    member = world.member("only", is_open=False)
    pool = world.pool(member, max_calls=3, window=3)
    pool.put(dict.fromkeys(range(6), 1))
    world.until(pool, lambda: bool(member.sent))
    pool.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("test-pool")]
    assert (member.load.num_outstanding, member.load.outstanding_cost) == (0, 0)


def test_backoff_grows_to_a_limit_and_heeds_what_the_service_asks(world: World) -> None:
    pauses = [max(backoff_s(attempt) for _ in range(50)) for attempt in range(12)]
    assert pauses[0] <= 0.2 < pauses[3] < pauses[8] <= MAX_BACKOFF_S
    asked = StillhouseError(Reason.DRAINING, "going down", retry_after_s=10.0)
    assert 5.0 <= backoff_s(0, asked) <= 10.0

    def wait_for_ever() -> None:
        while True:
            world.wait.pause(asked)

    with pytest.raises(StillhouseError, match="going down"):
        wait_for_ever()
    assert 60.0 <= world.clock.now < 61.0
    world.wait.answered()
    world.wait.pause(asked)
