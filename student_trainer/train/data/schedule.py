"""Row order of a run: the rows of each optimizer step as a pure function of seed and step, so that runs resume exactly."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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
        return int(_epoch_order(self.num_rows, self.seed, epoch)[index])

    def _mixed_row(self, epoch: int, index: int) -> int:
        """Returns row `index` of `epoch`: interleaved by dataset, in the dataset's own order."""
        counts = self._counts()
        turns = _interleave(counts, self.seed, epoch)
        dataset, nth = int(turns.datasets[index]), int(turns.before[index])
        size = self.dataset_sizes[dataset]
        passes, at = divmod(epoch * counts[dataset] + nth, size)
        order = _dataset_order(size, self.seed, passes, dataset)
        return sum(self.dataset_sizes[:dataset]) + int(order[at])

    def _counts(self) -> tuple[int, ...]:
        """Returns rows of each dataset in an epoch; they sum to `num_rows`."""
        total = sum(self.weights)
        edges = [round(sum(self.weights[: i + 1]) / total * self.num_rows) for i in range(len(self.weights))]
        return tuple(edge - before for edge, before in zip(edges, [0, *edges], strict=False))


class _Turns(NamedTuple):
    """The datasets of an epoch's rows."""

    datasets: NDArray[np.int32]
    """Dataset of each row."""
    before: NDArray[np.int32]
    """Number of the dataset's rows before it."""


@functools.lru_cache(maxsize=2)
def _interleave(counts: tuple[int, ...], seed: int, epoch: int) -> _Turns:
    generator = np.random.Generator(np.random.PCG64([seed, _TURN_STREAM, epoch]))
    datasets = generator.permutation(np.repeat(np.arange(len(counts), dtype=np.int32), counts))
    before = np.empty(len(datasets), np.int32)
    for dataset, count in enumerate(counts):
        before[datasets == dataset] = np.arange(count)
    return _Turns(datasets, before)


@functools.lru_cache(maxsize=2)
def _epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.integer[Any]]:
    """Returns the order of all rows in `epoch`."""
    return permutation(num_rows, [seed, _ORDER_STREAM, epoch])


@functools.lru_cache(maxsize=64)
def _dataset_order(num_rows: int, seed: int, number: int, dataset: int) -> NDArray[np.integer[Any]]:
    """Returns the order of a dataset's rows in pass `number` over it."""
    return permutation(num_rows, [seed, _ORDER_STREAM, number, dataset])


def permutation(num_rows: int, keys: list[int]) -> NDArray[np.integer[Any]]:
    """[num_rows] numbers of rows in the order that the seeds `keys` give; in 4 bytes each below 2^31 rows."""
    order: NDArray[np.integer[Any]] = np.arange(num_rows, dtype=np.int64 if num_rows >= 2**31 else np.int32)
    np.random.Generator(np.random.PCG64(keys)).shuffle(order)
    return order
