"""Rank, world size and local rank from the environment, and errors of other ranks. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from stillhouse.protos.errors import StillhouseError

TIMEOUT_VARIABLE = "STILLHOUSE_RANK_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 1800.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RankInfo:
    """Rank of this process among those of its run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Rank among the processes of this host; the index of its device."""

    @classmethod
    def from_environment(cls) -> RankInfo | None:
        """Reads the rank that torchrun or the first process set; None for a process started without one."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if not all(os.environ.get(name, "").isdecimal() for name in names):
            return None
        rank, size, local_rank = (int(os.environ[name]) for name in names)
        return cls(rank=rank, size=size, local_rank=local_rank)


def timeout_s() -> float:
    """Returns how long a process waits for others inside a step; between steps retry.teacher_wait_s is added."""
    return float(os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_S))


def attribute_to_rank(error: StillhouseError, rank: int, size: int) -> StillhouseError:
    """Prefixes the message of an error of process `rank` with its rank."""
    return StillhouseError(
        error.reason,
        f"Process {rank} of {size} (from 0): {error.message}",
        metadata=error.metadata,
        violations=error.violations,
    )
