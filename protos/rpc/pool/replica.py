"""The interface of a pooled service, the settings of a pool, and its record of a loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rpc.pool.load_balancing import Load

Item = TypeVar("Item")


class Replica(Protocol):
    """One of several equal services; called on a pool's threads."""

    target: str
    """Address, named in errors."""
    load: Load
    """Counters, shared by all pools that use the replica."""
    is_ready: bool
    """Result of the last probe; without one, a new pool probes it before it gives it work."""

    def probe(self) -> None:
        """Checks before each call that this is the right service, with credentials read anew; raises StillhouseError."""

    def ping(self) -> None:
        """Returns if a silent service is alive, and raises if it seems to hang."""


R = TypeVar("R", bound=Replica)


@dataclass(frozen=True, kw_only=True)
class PoolOptions(Generic[Item]):
    """Settings of a pool."""

    name: str
    """Prefix of its threads' names."""
    cost_of: Callable[[Item], int] = lambda _: 1
    """Cost of an item, such as tokens."""
    max_calls: int = 1
    """Calls at once to each replica."""
    window: float = math.inf
    """Most cost outstanding at a replica; `has_room` keeps what is put and not yet got to as much for each replica."""
    chunk: int = 1
    """Cost of consecutive items that one replica is given together."""
    max_attempts: int | None = None
    """Losses after which the result of an item is the error; None where only patience bounds them."""
    counts: Callable[[StillhouseError], bool] = lambda _: True
    """Decides if an error counts as an attempt of the items that it left unanswered."""
    is_passing: Callable[[StillhouseError, int], bool] = lambda error, _: error.retryable
    """Decides if a replica may recover by itself after an error, seen so many times in a row without an answer."""
    late: float = math.inf
    """Times the longest of a free replica's last answers after which that one is given what another replica still has."""
    silence_s: float = math.inf
    """Time without any answer that counts like the loss of all replicas."""


class Loss(NamedTuple):
    """A replica that broke, or that a probe found unusable."""

    target: str
    error: StillhouseError
    pause_s: float
    """Time after which it is probed."""
    was_open: bool
    """True if it was in use."""
    is_passing: bool
    """True if it may recover by itself."""
    num_requeued: int
    """Items that it left unanswered."""
