"""Which of several equal services gets the next piece of work: the one that will have answered it first, by what it owes and how fast it is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

HALF_LIFE_S = 30.0
"""What a service did so long ago counts half, so that one that was slow is tried again."""
TRUST_S = 1.0
"""A service is taken for as fast as the others until it has been busy for about so long."""


@dataclass(kw_only=True, slots=True)
class Load:
    """What one service owes and has done. Not safe between threads: the caller holds a lock."""

    outstanding: int = 0
    """Cost, such as tokens, of what was given to it and is unanswered."""
    num_outstanding: int = 0
    """Pieces of that."""
    answered: int = 0
    """Cost of what it answered."""
    num_answered: int = 0
    """Pieces of that."""
    num_returned: int = 0
    """Pieces that it owed and that were taken away from it."""
    _done: float = 0.0
    _busy_s: float = 0.0
    _seen_s: float = field(default_factory=time.monotonic)

    def give(self, cost: int) -> None:
        """It owes a piece more."""
        self._age()
        self.outstanding += cost
        self.num_outstanding += 1

    def answer(self, cost: int) -> None:
        """It answered a piece that it owed."""
        self._age()
        self.outstanding -= cost
        self.num_outstanding -= 1
        self.answered += cost
        self.num_answered += 1
        self._done += cost

    def take_back(self, cost: int) -> None:
        """It will not answer a piece that it owed."""
        self._age()
        self.outstanding -= cost
        self.num_outstanding -= 1
        self.num_returned += 1

    def _age(self) -> None:
        now = time.monotonic()
        passed_s = now - self._seen_s
        if passed_s <= 0:
            return
        self._seen_s = now
        kept = 0.5 ** (passed_s / HALF_LIFE_S)
        self._done *= kept
        self._busy_s = self._busy_s * kept + (passed_s if self.num_outstanding else 0.0)


def lightest(loads: Sequence[Load], cost: int) -> int:
    """Index of the load that would have answered a piece of `cost` first; the first of equal ones.

    The speed of each is its cost answered per second in which it owed something; speeds that nobody knows are equal.
    """
    if len(loads) == 1:
        return 0
    for load in loads:
        load._age()
    busy_s = sum(load._busy_s for load in loads)
    mean = sum(load._done for load in loads) / busy_s if busy_s else 0.0

    def due_s(index: int) -> float:
        load = loads[index]
        owed = load.outstanding + cost
        if not mean:
            return float(owed)
        return owed * (load._busy_s + TRUST_S) / (load._done + mean * TRUST_S)

    return min(range(len(loads)), key=due_s)
