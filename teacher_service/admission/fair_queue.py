"""Who may use the engine next: a bounded part of it is in use, and clients that wait take turns by tokens.

Two rules together. How much a client may hold is a multiple of what is free (dynamic thresholds: Choudhury and Hahne,
1998), so that one alone gets most of the engine and there is always room for another. Whose turn it is goes by deficit
round-robin over the tokens that wait (Shreedhar and Varghese, 1996), however many calls they come in.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from stillhouse.protos.rpc.call_limit import MULTIPLE

WHOLE = 1 << 30
"""The engine, in the units of `Cost.part`."""
QUANTUM_TOKENS = 1024
"""What a waiting client is given each time it is passed by."""
_LEAST_TOKENS = 32
"""What the shortest sequence counts for in the engine: it has work besides its tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What an item costs."""

    tokens: int
    """Prompt tokens and new tokens: what counts between clients."""
    part: int
    """Part of the engine that it holds, in [1, WHOLE]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Capacity:
    """How much of the engine an item takes up."""

    max_tokens: int
    """Tokens to read that the engine is given at once."""
    max_samples: int
    """Samples that it writes at once."""

    def scoring(self, num_tokens: int) -> Cost:
        """The cost of a sequence to score."""
        return Cost(tokens=num_tokens, part=self._reading(num_tokens))

    def writing(self, num_prompt: int, num_new: int) -> Cost:
        """The cost of a sample: it holds a place in every step until it ends, whatever its length."""
        part = max(self._reading(num_prompt), WHOLE // self.max_samples)
        return Cost(tokens=num_prompt + num_new, part=part)

    def _reading(self, num_tokens: int) -> int:
        return max(1, min(WHOLE, max(num_tokens, _LEAST_TOKENS) * WHOLE // self.max_tokens))


@dataclass(eq=False, kw_only=True, slots=True)
class _Item:
    cost: Cost
    turn: asyncio.Future[None]


@dataclass(eq=False, kw_only=True, slots=True)
class _Client:
    name: str
    waiting: dict[_Item, None] = field(default_factory=dict)
    """In the order of arrival; a dictionary, so that one can leave from the middle."""
    deficit_tokens: int = 0
    held: int = 0


class Admission:
    """Gives items their turn. It belongs to one event loop."""

    def __init__(self) -> None:
        self._clients: dict[str, _Client] = {}
        self._round: deque[_Client] = deque()
        self._free = WHOLE
        self.num_running = 0
        """Items that hold a part of the engine."""

    @property
    def free(self) -> int:
        """Part of the engine that nobody holds."""
        return self._free

    @property
    def total_waiting(self) -> int:
        """Items of all clients that wait for their turn."""
        return sum(len(each.waiting) for each in list(self._round))

    def num_waiting(self, client: str) -> int:
        """Items of a client that wait for their turn."""
        return len(self._clients[client].waiting) if client in self._clients else 0

    @asynccontextmanager
    async def turn(self, client: str, cost: Cost) -> AsyncIterator[None]:
        """Waits for the item's turn and holds its part of the engine; one who is cancelled meanwhile leaves no trace."""
        own = self._clients.setdefault(client, _Client(name=client))
        item = _Item(cost=cost, turn=asyncio.get_running_loop().create_future())
        if not own.waiting:
            self._round.append(own)
        own.waiting[item] = None
        self._admit()
        try:
            await item.turn
            yield
        finally:
            self._leave(own, item)
            self._admit()

    def _leave(self, client: _Client, item: _Item) -> None:
        if item in client.waiting:
            del client.waiting[item]
            if not client.waiting:
                self._round.remove(client)
                client.deficit_tokens = 0
        else:
            client.held -= item.cost.part
            self._free += item.cost.part
            self.num_running -= 1
        if not client.waiting and client.held == 0:
            self._clients.pop(client.name, None)

    def _admit(self) -> None:
        num_passed = 0
        while num_passed < len(self._round):
            client = self._round[0]
            item = next(iter(client.waiting))
            if client.held and client.held >= MULTIPLE * self._free:
                num_passed += 1  # it has its part for the present
                self._round.rotate(-1)
            elif client.deficit_tokens < item.cost.tokens:
                num_passed = 0
                client.deficit_tokens += QUANTUM_TOKENS
                self._round.rotate(-1)
            elif item.cost.part > self._free:
                return  # the others wait too, or a long item would never find room
            else:
                num_passed = 0
                self._begin(client, item)

    def _begin(self, client: _Client, item: _Item) -> None:
        del client.waiting[item]
        client.deficit_tokens -= item.cost.tokens
        client.held += item.cost.part
        self._free -= item.cost.part
        self.num_running += 1
        if not client.waiting:
            self._round.popleft()
            client.deficit_tokens = 0
        if not item.turn.done():
            item.turn.set_result(None)
