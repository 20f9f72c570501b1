"""Which rows each optimizer step takes: a pure function of seed and step, so that a resumed run goes on with the same text."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np

from student_trainer.config import OptimizerConfig

_ORDER_STREAM = 2
"""Distinguishes the draws of the orders from that of the split, which has the same seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cursor:
    """Where in the data a run is: the next row to take."""

    epoch: int
    """Whole passes behind it."""
    index: int
    """Rows taken of the current pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """The order of rows over a whole run: one permutation per epoch, one behind the other, cut into steps.

    A step may reach into the next epoch; the last one of a run that is measured in epochs may be shorter.
    """

    num_rows: int
    rows_per_step: int
    num_taken: int
    """Rows that the run takes in all."""
    seed: int

    @classmethod
    def of(cls, num_rows: int, optimizer: OptimizerConfig, seed: int) -> Schedule:
        """The schedule of a run over `num_rows` examples."""
        rows_per_step = optimizer.micro_batch_size * optimizer.grad_accum_steps
        if optimizer.max_steps is None:
            num_taken = max(1, math.floor(optimizer.epochs * num_rows + 1e-9))
        else:
            num_taken = optimizer.max_steps * rows_per_step
        return cls(num_rows=num_rows, rows_per_step=rows_per_step, num_taken=num_taken, seed=seed)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return math.ceil(self.num_taken / self.rows_per_step)

    def rows(self, step: int) -> list[int]:
        """Indices of the rows that step `step` (from 0) takes, in order."""
        begin = step * self.rows_per_step
        end = min(begin + self.rows_per_step, self.num_taken)
        return [self._row(place) for place in range(begin, end)]

    def cursor(self, step: int) -> Cursor:
        """The next row after `step` steps."""
        epoch, index = divmod(min(step * self.rows_per_step, self.num_taken), self.num_rows)
        return Cursor(epoch=epoch, index=index)

    def epochs(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        return min(step * self.rows_per_step, self.num_taken) / self.num_rows

    def _row(self, place: int) -> int:
        epoch, index = divmod(place, self.num_rows)
        return permutation(self.num_rows, self.seed, epoch)[index]


@functools.lru_cache(maxsize=2)
def permutation(num_rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    """The order of rows in `epoch`."""
    generator = np.random.Generator(np.random.PCG64([seed, _ORDER_STREAM, epoch]))
    return tuple(generator.permutation(num_rows).tolist())
