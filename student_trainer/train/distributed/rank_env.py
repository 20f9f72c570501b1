"""Which of the processes of a run one is, and how another one's error is told; imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from stillhouse.protos.errors import StillhouseError

TIMEOUT_VARIABLE = "STILLHOUSE_RANK_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 1800.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Which of the processes of a run one is."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Among those of its host; the index of its device."""

    @classmethod
    def given(cls) -> Place | None:
        """The place that torchrun, or the first process, gave to this one by its environment; None for a first process."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        if not all(os.environ.get(name, "").isdecimal() for name in names):
            return None
        rank, size, local_rank = (int(os.environ[name]) for name in names)
        return cls(rank=rank, size=size, local_rank=local_rank)


def timeout_s() -> float:
    """How long a process waits for another one inside a step; between steps retry.teacher_wait_s is added."""
    return float(os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT_S))


def of_another(error: StillhouseError, rank: int, size: int) -> StillhouseError:
    """The error of process `rank` as another one tells it."""
    return StillhouseError(
        error.reason,
        f"Process {rank} of {size} (from 0): {error.message}",
        metadata=error.metadata,
        violations=error.violations,
    )
