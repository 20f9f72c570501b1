"""Fair queue of the engine: a client's share is bounded, and waiting clients take turns by deficit round-robin.

Share: a client may hold a multiple of what is free (dynamic thresholds, Choudhury and Hahne, 1998), so that a single
client gets most of the engine and a newcomer always finds room. Order: deficit round-robin (DRR, Shreedhar and
Varghese, 1996) over the waiting tokens of each client, however many calls carry them. On its turn a client whose
deficit does not cover its first item gains one quantum, QUANTUM_TOKENS, and is passed by; an admitted item is
deducted from the deficit, which an idle client loses.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from stillhouse.protos.rpc.call_limit import MULTIPLE

ENGINE_UNITS = 1 << 30
"""Capacity of the complete engine, in the units of `Cost.engine_units`."""
QUANTUM_TOKENS = 1024
"""DRR quantum: tokens that a client's deficit gains each time it is passed by."""
_LEAST_TOKENS = 32
"""Smallest engine cost of a sequence, which has overhead besides its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Cost of one item."""

    tokens: int
    """Prompt tokens and new tokens: the unit of fairness between clients."""
    engine_units: int
    """Share of the engine that it occupies, in [1, ENGINE_UNITS]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """Size of the engine, from which costs follow."""

    max_tokens: int
    """Tokens in flight that fill the engine."""
    max_samples: int
    """Concurrent samples that fill the engine."""

    def score_cost(self, num_tokens: int) -> Cost:
        """Cost of a sequence to score."""
        return Cost(tokens=num_tokens, engine_units=self._token_units(num_tokens))

    def generate_cost(self, num_prompt: int, num_new: int) -> Cost:
        """Cost of a sample: it occupies a slot of every step until it ends, whatever its length."""
        engine_units = max(self._token_units(num_prompt), ENGINE_UNITS // self.max_samples)
        return Cost(tokens=num_prompt + num_new, engine_units=engine_units)

    def _token_units(self, num_tokens: int) -> int:
        return max(1, min(ENGINE_UNITS, max(num_tokens, _LEAST_TOKENS) * ENGINE_UNITS // self.max_tokens))


@dataclass(eq=False, kw_only=True, slots=True)
class _Waiter:
    cost: Cost
    turn: asyncio.Future[None]


@dataclass(eq=False, kw_only=True, slots=True)
class _Client:
    name: str
    waiting: dict[_Waiter, None] = field(default_factory=dict)
    """In order of arrival; a dictionary, for removal from the middle."""
    deficit_tokens: int = 0
    held: int = 0


class FairQueue:
    """Admits items by deficit round-robin. Bound to one event loop."""

    def __init__(self) -> None:
        self._clients: dict[str, _Client] = {}
        self._round: deque[_Client] = deque()
        self.free = ENGINE_UNITS
        """Unoccupied share of the engine, in [0, ENGINE_UNITS]."""
        self.num_running = 0
        """Items that occupy the engine."""
        self._busy: tuple[float, float | None] = (0.0, None)
        """Seconds of the past, and the time since which items occupy the engine; one value, since other threads read it."""

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one item occupied the engine."""
        past_s, since_s = self._busy
        return past_s if since_s is None else past_s + time.monotonic() - since_s

    @property
    def total_waiting(self) -> int:
        """Waiting items of all clients."""
        return sum(len(each.waiting) for each in list(self._round))

    def num_waiting(self, client: str) -> int:
        """Waiting items of one client."""
        return len(self._clients[client].waiting) if client in self._clients else 0

    def waiting_by_client(self) -> dict[str, int]:
        """Waiting items of each client that has any in the queue or in the engine."""
        return {name: len(each.waiting) for name, each in self._clients.items()}

    @asynccontextmanager
    async def turn(self, client: str, cost: Cost) -> AsyncIterator[None]:
        """Waits for the item's turn and holds its share of the engine; a cancelled item leaves no trace."""
        own = self._clients.setdefault(client, _Client(name=client))
        waiter = _Waiter(cost=cost, turn=asyncio.get_running_loop().create_future())
        if not own.waiting:
            self._round.append(own)
        own.waiting[waiter] = None
        self._admit()
        try:
            await waiter.turn
            yield
        finally:
            self._leave(own, waiter)
            self._admit()

    def _leave(self, client: _Client, waiter: _Waiter) -> None:
        if waiter in client.waiting:
            del client.waiting[waiter]
            if not client.waiting:
                self._round.remove(client)
                client.deficit_tokens = 0
        else:
            client.held -= waiter.cost.engine_units
            self.free += waiter.cost.engine_units
            self.num_running -= 1
            if not self.num_running:
                self._busy = self.busy_s, None
        if not client.waiting and client.held == 0:
            self._clients.pop(client.name, None)

    def _admit(self) -> None:
        num_passed = 0
        while num_passed < len(self._round):
            client = self._round[0]
            waiter = next(iter(client.waiting))
            if client.held and client.held >= MULTIPLE * self.free:
                num_passed += 1  # the client has its share for now
                self._round.rotate(-1)
            elif client.deficit_tokens < waiter.cost.tokens:
                num_passed = 0
                client.deficit_tokens += QUANTUM_TOKENS
                self._round.rotate(-1)
            elif waiter.cost.engine_units > self.free:
                return  # all wait, or a long item would never find room
            else:
                num_passed = 0
                self._begin(client, waiter)

    def _begin(self, client: _Client, waiter: _Waiter) -> None:
        del client.waiting[waiter]
        client.deficit_tokens -= waiter.cost.tokens
        client.held += waiter.cost.engine_units
        self.free -= waiter.cost.engine_units
        if not self.num_running:
            self._busy = self._busy[0], time.monotonic()
        self.num_running += 1
        if not client.waiting:
            self._round.popleft()
            client.deficit_tokens = 0
        if not waiter.turn.done():
            waiter.turn.set_result(None)
