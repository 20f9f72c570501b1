"""Which rows each optimizer step takes: a pure function of seed and step, so that a resumed run goes on with the same text."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stillhouse.student_trainer.config.schema import OptimizerConfig

_ORDER_STREAM = 2
"""Distinguishes the draws of the orders from that of the split, which has the same seed."""

_TURN_STREAM = 5
"""Distinguishes the draws of which dataset's turn it is."""


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

    A step may reach into the next epoch; the last one of a run that is measured in epochs may be shorter. With
    `weights` an epoch has as many rows, of each dataset its share: rows of a small one come again within the epoch,
    and each comes again only after all others of its dataset.
    """

    num_rows: int
    rows_per_step: int
    num_taken: int
    """Rows that the run takes in all."""
    seed: int
    parts: tuple[int, ...] = ()
    """Rows of each dataset, which lie one behind the other; only needed with `weights`."""
    weights: tuple[float, ...] = ()
    """Share of each dataset; empty: every row once an epoch."""

    @classmethod
    def of(
        cls,
        num_rows: int,
        optimizer: OptimizerConfig,
        seed: int,
        parts: Sequence[int] = (),
        weights: Sequence[float] = (),
    ) -> Schedule:
        """The schedule of a run over `num_rows` examples."""
        rows_per_step = optimizer.micro_batch_size * optimizer.grad_accum_steps
        if optimizer.max_steps is None:
            num_taken = max(1, math.floor(optimizer.epochs * num_rows + 1e-9))
        else:
            num_taken = optimizer.max_steps * rows_per_step
        return cls(
            num_rows=num_rows,
            rows_per_step=rows_per_step,
            num_taken=num_taken,
            seed=seed,
            parts=tuple(parts),
            weights=tuple(weights),
        )

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
        if self.weights:
            return self._mixed_row(epoch, index)
        return permutation(self.num_rows, self.seed, epoch)[index]

    def _mixed_row(self, epoch: int, index: int) -> int:
        """Row `index` of `epoch`: which dataset is its turn, and which of its rows."""
        counts = self._counts()
        part, nth = _turns(counts, self.seed, epoch)[index]
        size = self.parts[part]
        passes, at = divmod(epoch * counts[part] + nth, size)
        return sum(self.parts[:part]) + permutation(size, self.seed, passes, part)[at]

    def _counts(self) -> tuple[int, ...]:
        """Rows of each dataset in an epoch; they sum to `num_rows`."""
        total = sum(self.weights)
        edges = [round(sum(self.weights[: i + 1]) / total * self.num_rows) for i in range(len(self.weights))]
        return tuple(edge - before for edge, before in zip(edges, [0, *edges], strict=False))


@functools.lru_cache(maxsize=2)
def _turns(counts: tuple[int, ...], seed: int, epoch: int) -> list[tuple[int, int]]:
    """The dataset of each row of `epoch`, with how many of its rows came before in the epoch."""
    generator = np.random.Generator(np.random.PCG64([seed, _TURN_STREAM, epoch]))
    order = generator.permutation(np.repeat(np.arange(len(counts)), counts)).tolist()
    before = [0] * len(counts)
    turns = []
    for part in order:
        turns.append((part, before[part]))
        before[part] += 1
    return turns


@functools.lru_cache(maxsize=64)
def permutation(num_rows: int, seed: int, epoch: int, part: int | None = None) -> tuple[int, ...]:
    """The order of rows in `epoch`, or of those of one dataset in one pass over it."""
    keys = [seed, _ORDER_STREAM, epoch] if part is None else [seed, _ORDER_STREAM, epoch, part]
    generator = np.random.Generator(np.random.PCG64(keys))
    return tuple(generator.permutation(num_rows).tolist())
