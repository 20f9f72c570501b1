"""Row order of a run: the rows of each optimizer step as a pure function of seed and step, so that runs resume exactly."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stillhouse.student_trainer.config.schema import OptimizerConfig

_ORDER_STREAM = 2
"""Separates the random numbers of the row order from those of the split, which has the same seed."""

_TURN_STREAM = 5
"""Separates the random numbers that interleave datasets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Order of rows over a run: one permutation per epoch, concatenated and cut into steps.

    A step may cross into the next epoch; the last step of a run measured in epochs may be shorter. With `weights` an
    epoch has as many rows, with each dataset's share: rows of a small dataset repeat within the epoch, but only after
    all others of their dataset.
    """

    num_rows: int
    rows_per_step: int
    num_taken: int
    """Rows that the run takes in total."""
    seed: int
    dataset_sizes: tuple[int, ...] = ()
    """Rows of each dataset, in the order of the corpus; only needed with `weights`."""
    weights: tuple[float, ...] = ()
    """Share of each dataset; empty: every row once an epoch."""

    @classmethod
    def from_config(
        cls,
        num_rows: int,
        optimizer: OptimizerConfig,
        seed: int,
        dataset_sizes: Sequence[int] = (),
        weights: Sequence[float] = (),
    ) -> Schedule:
        """Makes the schedule of a run over `num_rows` examples."""
        rows_per_step = optimizer.rows_per_update
        if optimizer.max_steps is None:
            num_taken = max(1, math.floor(optimizer.epochs * num_rows + 1e-9))
        else:
            num_taken = optimizer.max_steps * rows_per_step
        return cls(
            num_rows=num_rows,
            rows_per_step=rows_per_step,
            num_taken=num_taken,
            seed=seed,
            dataset_sizes=tuple(dataset_sizes),
            weights=tuple(weights),
        )

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return math.ceil(self.num_taken / self.rows_per_step)

    def rows(self, step: int) -> list[int]:
        """Returns indices of the rows of step `step` (from 0), in order."""
        begin = step * self.rows_per_step
        end = min(begin + self.rows_per_step, self.num_taken)
        return [self._row(position) for position in range(begin, end)]

    def epochs(self, step: int) -> float:
        """Returns passes over the data after `step` steps."""
        return min(step * self.rows_per_step, self.num_taken) / self.num_rows

    def _row(self, position: int) -> int:
        epoch, index = divmod(position, self.num_rows)
        if self.weights:
            return self._mixed_row(epoch, index)
        return permutation(self.num_rows, self.seed, epoch)[index]

    def _mixed_row(self, epoch: int, index: int) -> int:
        """Returns row `index` of `epoch`: interleaved by dataset, in the dataset's own order."""
        counts = self._counts()
        dataset, nth = _interleave(counts, self.seed, epoch)[index]
        size = self.dataset_sizes[dataset]
        passes, at = divmod(epoch * counts[dataset] + nth, size)
        return sum(self.dataset_sizes[:dataset]) + permutation(size, self.seed, passes, dataset)[at]

    def _counts(self) -> tuple[int, ...]:
        """Returns rows of each dataset in an epoch; they sum to `num_rows`."""
        total = sum(self.weights)
        edges = [round(sum(self.weights[: i + 1]) / total * self.num_rows) for i in range(len(self.weights))]
        return tuple(edge - before for edge, before in zip(edges, [0, *edges], strict=False))


@functools.lru_cache(maxsize=2)
def _interleave(counts: tuple[int, ...], seed: int, epoch: int) -> list[tuple[int, int]]:
    """Returns each row's dataset in `epoch`, and the number of the dataset's rows before it."""
    generator = np.random.Generator(np.random.PCG64([seed, _TURN_STREAM, epoch]))
    order = generator.permutation(np.repeat(np.arange(len(counts)), counts)).tolist()
    before = [0] * len(counts)
    turns = []
    for dataset in order:
        turns.append((dataset, before[dataset]))
        before[dataset] += 1
    return turns


@functools.lru_cache(maxsize=64)
def permutation(num_rows: int, seed: int, epoch: int, dataset: int | None = None) -> tuple[int, ...]:
    """Returns the order of all rows in `epoch`, or of one dataset's rows in one pass over it."""
    keys = [seed, _ORDER_STREAM, epoch] if dataset is None else [seed, _ORDER_STREAM, epoch, dataset]
    generator = np.random.Generator(np.random.PCG64(keys))
    return tuple(generator.permutation(num_rows).tolist())
