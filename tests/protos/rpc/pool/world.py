"""Replicas, a pool and a clock that a test moves, without a network."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.pool.bounded_wait import BoundedWait, Clock
from stillhouse.protos.rpc.pool.load_balancing import Load
from stillhouse.protos.rpc.pool.replica import Loss, PoolOptions
from stillhouse.protos.rpc.pool.service_pool import Call, ServicePool

TICK_S = 0.001


class TestClock(Clock):
    """A clock that only the test moves; waiting looks again after a moment of real time."""

    __test__ = False

    def __init__(self) -> None:
        self.now = 0.0
        self.step_s = 0.0
        """Time that passes with each look."""

    def now_s(self) -> float:
        return self.now

    def wait(self, condition: threading.Condition, timeout_s: float | None) -> None:
        condition.wait(TICK_S)
        self.now += self.step_s

    def sleep(self, duration_s: float) -> None:
        self.now += duration_s


class Stopped(Exception):  # noqa: N818 - not an error
    """The caller was asked to stop."""


class Wait(BoundedWait):
    """A wait of at most a minute that a test can stop."""

    is_stopped = False

    def on_check(self) -> None:
        if self.is_stopped:
            raise Stopped


@dataclass(eq=False)
class Member:
    """A service as a plain object: it answers an item with its own name, or breaks as the test says."""

    target: str
    load: Load
    is_ready: bool = True
    breaks: Callable[[int], StillhouseError | None] = lambda _: None
    """Error of the call that meets an item."""
    probe_error: StillhouseError | None = None
    gate: threading.Event = field(default_factory=threading.Event)
    """Calls answer once it is set."""
    num_probes: int = 0
    sent: list[int] = field(default_factory=list)
    is_alive: bool = True

    def probe(self) -> None:
        self.num_probes += 1
        if self.probe_error is not None:
            raise self.probe_error

    def ping(self) -> None:
        if not self.is_alive:
            raise TimeoutError("no reaction.")

    def serve(self, call: Call[int, str]) -> None:
        is_cancelled = threading.Event()

        def cancel() -> None:
            is_cancelled.set()
            self.gate.set()

        call.on_cancel(cancel)
        items = call.take()
        self.sent += items
        self.gate.wait()
        if is_cancelled.is_set():
            raise StillhouseError(Reason.CANCELLED, "the call was cancelled")
        for item_id in items:
            error = self.breaks(item_id)
            if error is not None:
                raise error
            call.answer(item_id, self.target)


@dataclass
class World:
    """A pool of members, its clock, and the losses that its caller was told of."""

    clock: TestClock
    wait: Wait
    losses: list[Loss] = field(default_factory=list)
    pools: list[ServicePool[int, str, Member]] = field(default_factory=list)

    def member(self, target: str, *, is_open: bool = True, **options: Any) -> Member:
        member = Member(target, Load(now_s=self.clock.now_s), **options)
        if is_open:
            member.gate.set()
        return member

    def pool(self, *members: Member, **options: Any) -> ServicePool[int, str, Member]:
        settings: PoolOptions[int] = PoolOptions(name="test-pool", **options)
        pool: ServicePool[int, str, Member] = ServicePool(
            members, Member.serve, settings, on_lost=self.losses.append, clock=self.clock
        )
        self.pools.append(pool)
        return pool

    def results(self, pool: ServicePool[int, str, Member], count: int) -> list[tuple[int, Any]]:
        """The next results as they come."""
        found: list[tuple[int, Any]] = []
        while len(found) < count:
            result = pool.poll(self.wait)
            if result is not None:
                found.append(result)
        return found

    def until(self, pool: ServicePool[int, str, Member], happened: Callable[[], bool]) -> None:
        """Polls until something has happened."""
        while not happened():
            assert pool.poll(self.wait) is None


def lost(reason: Reason = Reason.TEACHER_UNREACHABLE, message: str = "the line is cut") -> StillhouseError:
    return StillhouseError(reason, message)
