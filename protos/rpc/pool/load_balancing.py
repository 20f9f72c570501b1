"""Load balancing over replicas by least expected completion time: outstanding cost over measured speed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

HALF_LIFE_S = 30.0
"""Age at which a measurement counts half, so that a replica that was slow is tried again."""
TRUST_S = 1.0
"""Busy time after which a replica's own speed outweighs the mean of all."""


@dataclass(eq=False, kw_only=True, slots=True)
class Load:
    """Outstanding and finished work of one replica; safe between threads, and shared by the pools that use the replica."""

    now_s: Callable[[], float] = time.monotonic
    outstanding_cost: int = 0
    """Cost, such as tokens, of the items that it has and has not answered."""
    num_outstanding: int = 0
    """Number of these items."""
    num_answered: int = 0
    """Items that it answered."""
    num_returned: int = 0
    """Items that it had and that were taken back unanswered."""
    num_breaks: int = 0
    """Losses of the replica while it was in use."""
    _total_busy_s: float = 0.0
    _done_cost: float = 0.0
    _busy_s: float = 0.0
    _seen_s: float = field(init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._seen_s = self.now_s()

    def assign(self, cost: int) -> None:
        """Counts an item that the replica is given."""
        self._move(cost, 1)

    def complete(self, cost: int) -> None:
        """Counts an item that the replica answered."""
        self._move(-cost, -1)
        with self._lock:
            self.num_answered += 1
            self._done_cost += cost

    def withdraw(self, cost: int) -> None:
        """Counts an item that is taken back unanswered."""
        self._move(-cost, -1)
        with self._lock:
            self.num_returned += 1

    def speed(self) -> tuple[float, float]:
        """Cost that was answered and seconds in which something was outstanding, both weighted by age."""
        with self._lock:
            self._age()
            return self._done_cost, self._busy_s

    def busy_s(self) -> float:
        """Seconds so far in which something was outstanding."""
        with self._lock:
            self._age()
            return self._total_busy_s

    def _move(self, cost: int, count: int) -> None:
        with self._lock:
            self._age()
            self.outstanding_cost += cost
            self.num_outstanding += count

    def _age(self) -> None:
        now_s = self.now_s()
        passed_s = now_s - self._seen_s
        self._seen_s = now_s
        kept = 0.5 ** (passed_s / HALF_LIFE_S)
        self._done_cost *= kept
        added_s = passed_s if self.num_outstanding else 0.0
        self._busy_s = self._busy_s * kept + added_s
        self._total_busy_s += added_s


def earliest_finish(loads: Sequence[Load], cost: int) -> int:
    """Index of the load that would finish `cost` more first; the first of equal ones.

    A replica's speed is its answered cost per busy second, drawn to the mean of all until it was busy for about TRUST_S.
    """
    if len(loads) == 1:
        return 0
    speeds = [load.speed() for load in loads]
    busy_s = sum(busy for _, busy in speeds)
    mean = sum(done for done, _ in speeds) / busy_s if busy_s else 0.0

    def finish_s(index: int) -> float:
        done, busy = speeds[index]
        work = loads[index].outstanding_cost + cost
        return work * (busy + TRUST_S) / (done + mean * TRUST_S) if mean else float(work)

    return min(range(len(loads)), key=finish_s)
