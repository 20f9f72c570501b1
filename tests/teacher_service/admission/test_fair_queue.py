"""Fair queue: shares by tokens however many calls a client has, room for newcomers, and no trace of clients that leave."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import pytest

from stillhouse.teacher_service.admission.fair_queue import (
    ENGINE_UNITS,
    Capacity,
    Cost,
    FairQueue,
)
from stillhouse.teacher_service.admission.response_budget import LEAST_BYTES, CallBudget, ResponseBudget

CAPACITY = Capacity(max_tokens=8192, max_samples=16)


class Engine:
    """Processes items in order, one after the other."""

    def __init__(self) -> None:
        self.admission = FairQueue()
        self.tokens: Counter[str] = Counter()
        self._inside: asyncio.Queue[tuple[str, int, asyncio.Event]] = asyncio.Queue()

    async def score(self, client: str, num_tokens: int) -> None:
        async with self.admission.turn(client, CAPACITY.score_cost(num_tokens)):
            done = asyncio.Event()
            self._inside.put_nowait((client, num_tokens, done))
            await done.wait()

    async def work(self, num_items: int) -> None:
        for _ in range(num_items):
            client, num_tokens, done = await self._inside.get()
            self.tokens[client] += num_tokens
            done.set()
            for _ in range(3):  # one that waited leaves, and others come in
                await asyncio.sleep(0)


@pytest.mark.parametrize("lengths", [(100, 100), (2000, 100), (100, 3000)])
async def test_waiting_clients_get_equal_tokens(lengths: tuple[int, int]) -> None:
    engine = Engine()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(engine.score("flood", lengths[0])) for _ in range(3000)]
        tasks += [group.create_task(engine.score("small", lengths[1])) for _ in range(900)]
        await engine.work(100)  # earlier items are served first
        begin = engine.tokens.copy()
        while engine.admission.num_waiting("flood") and engine.admission.num_waiting("small"):
            await engine.work(1)
        served = {client: engine.tokens[client] - begin[client] for client in begin}
        for task in tasks:
            task.cancel()
    assert min(served.values()) > 6 * CAPACITY.max_tokens
    # Short items fill what long ones leave, hence the width.
    assert 0.6 < served["flood"] / served["small"] < 1.6
    assert engine.admission.free == ENGINE_UNITS


async def test_a_single_client_leaves_room_for_a_newcomer() -> None:
    engine = Engine()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(engine.score("flood", 100)) for _ in range(1000)]
        await asyncio.sleep(0)
        assert 0.2 < engine.admission.free / ENGINE_UNITS < 0.3
        tasks.append(group.create_task(engine.score("other", 100)))
        await asyncio.sleep(0)
        assert engine.admission.num_waiting("other") == 0
        for task in tasks:
            task.cancel()


async def test_a_sequence_that_fills_the_engine_is_not_starved() -> None:
    engine = Engine()
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(engine.score("flood", 100)) for _ in range(1000)]
        await asyncio.sleep(0)
        long = group.create_task(engine.score("long", 10 * CAPACITY.max_tokens))
        working = group.create_task(engine.work(1001))
        async with asyncio.timeout(10):
            await long
        assert engine.admission.num_waiting("flood") > 500
        for task in (*tasks, working):
            task.cancel()


async def test_a_cancelled_item_leaves_no_trace() -> None:
    admission = FairQueue()
    cost = CAPACITY.generate_cost(10, 100)

    async def hold(client: str) -> None:
        async with admission.turn(client, cost):
            await asyncio.Event().wait()

    tasks = [asyncio.create_task(hold(client)) for client in "ab" for _ in range(30)]
    await asyncio.sleep(0)
    assert admission.num_waiting("a") > 0
    # Also cancelled in the moment of its turn.
    tasks[0].cancel()
    tasks[12].cancel()
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert admission.free == ENGINE_UNITS
    assert admission.num_waiting("a") == admission.num_waiting("b") == 0


async def test_busy_time_is_that_with_an_item_in_the_engine() -> None:
    admission = FairQueue()
    cost = CAPACITY.generate_cost(10, 100)

    async def hold(seconds: float) -> None:
        async with admission.turn("a", cost):
            await asyncio.sleep(seconds)

    assert admission.busy_s == 0
    began = time.monotonic()
    await asyncio.gather(hold(0.1), hold(0.2))  # overlaps count once
    first = admission.busy_s
    assert 0.2 <= first <= time.monotonic() - began
    await asyncio.sleep(0.3)
    assert admission.busy_s == first
    running = asyncio.create_task(hold(60))
    await asyncio.sleep(0.1)
    assert admission.busy_s >= first + 0.1
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    ended = admission.busy_s
    await asyncio.sleep(0.02)
    assert admission.busy_s == ended


def test_costs_are_tokens_for_fairness_and_engine_units_for_room() -> None:
    assert CAPACITY.score_cost(819) == Cost(tokens=819, engine_units=819 * ENGINE_UNITS // 8192)
    assert CAPACITY.score_cost(1 << 20).engine_units == ENGINE_UNITS
    assert CAPACITY.generate_cost(10, 500) == Cost(tokens=510, engine_units=ENGINE_UNITS // 16)
    assert CAPACITY.generate_cost(4096, 1).engine_units == ENGINE_UNITS // 2


async def test_an_unread_call_stops_at_its_limit_and_resumes_when_read() -> None:
    memory = ResponseBudget(max_bytes=64 << 20)
    slow, other = CallBudget(memory), CallBudget(memory)
    holding = asyncio.create_task(hold_all(slow, 100))
    await asyncio.sleep(0)
    assert 6 << 20 <= memory.num_bytes <= 8 << 20
    await asyncio.wait_for(other.reserve(1 << 20), 1)
    before = memory.num_bytes
    slow.release(3 << 20)
    await asyncio.sleep(0)
    assert abs(memory.num_bytes - before) <= 1 << 20
    holding.cancel()
    slow.release_all()
    other.release_all()
    assert memory.num_bytes == 0
    await asyncio.wait_for(other.reserve(1 << 30), 1)  # a single response always finds room
    assert memory.call_limit_bytes == LEAST_BYTES


async def hold_all(unread: CallBudget, count: int) -> None:
    for _ in range(count):
        await unread.reserve(1 << 20)
