"""What is asked about one sequence, and the interface of whatever answers it: a teacher, a cache, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.train.process.waiting import Patience


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherQuery:
    """A sequence, and the positions that are asked about."""

    token_ids: NDArray[np.int32]
    """[T]."""
    start: int
    """The distributions at positions [start, T) are wanted."""
    place: str
    """File and row, which errors name."""
    query_token_ids: NDArray[np.int32] | None = None
    """[T - start, Q]: ids whose log-probabilities are wanted too."""

    @property
    def num_rows(self) -> int:
        """Positions that are asked about."""
        return len(self.token_ids) - self.start

    @property
    def cost(self) -> int:
        """Tokens that a teacher reads for it."""
        return len(self.token_ids)


class TargetStream(Protocol):
    """Answers to sequences, by the ids that the caller gives them; the caller bounds how much is in flight."""

    @property
    def num_asked(self) -> int:
        """Sequences that a teacher was asked for."""
        ...

    def submit(self, sequence_id: int, asked: TeacherQuery) -> None:
        """Ask."""
        ...

    def take(self, sequence_id: int, patience: Patience) -> Distributions:
        """The answer to a submitted sequence, waiting for it; each can be taken once."""
        ...

    def close(self) -> None:
        """End it; what is unanswered is dropped."""
        ...
