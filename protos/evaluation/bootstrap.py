"""Bootstrap intervals over rows: of one model, and paired, of the difference of two models on the same rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.evaluation.row_sums import RowSums

RESAMPLES = 1000
SEED = 12345
"""Seed of the samples of rows, the same for every metric and model, so that differences are paired."""
CONFIDENCE = 0.95
_AT_ONCE = 2**22
"""Numbers held at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A value with its percentile interval."""

    value: float
    low: float
    high: float


def interval(rows: RowSums, *, resamples: int = RESAMPLES, seed: int = SEED) -> Interval:
    """Returns a metric with the interval that holds CONFIDENCE of its values on resampled rows."""
    return _interval(rows.value, _resampled(rows, resamples, seed))


def paired_interval(
    after: RowSums, before: RowSums, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """Returns the difference after - before with its interval: each sample takes the same rows of both.

    Raises ValueError if they are not of the same rows.
    """
    if len(after.sums) != len(before.sums):
        raise ValueError(f"{len(after.sums)} rows are compared with {len(before.sums)}")
    differences = _resampled(after, resamples, seed) - _resampled(before, resamples, seed)
    return _interval(after.value - before.value, differences)


def _interval(value: float, samples: NDArray[np.float64]) -> Interval:
    finite = samples[np.isfinite(samples)]
    if not finite.size:
        return Interval(value=value, low=float("nan"), high=float("nan"))
    low, high = np.quantile(finite, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(value=value, low=float(low), high=float(high))


def _resampled(rows: RowSums, resamples: int, seed: int) -> NDArray[np.float64]:
    """Returns the metric of each sample of as many rows, drawn with replacement, [R]."""
    number = len(rows.sums)
    if not number:
        return np.full(resamples, np.nan)
    generator = np.random.Generator(np.random.PCG64(seed))
    values = []
    step = max(1, _AT_ONCE // number)
    for first in range(0, resamples, step):
        size = min(step, resamples - first)
        # Numbers of times that each row is drawn.
        counts = generator.multinomial(number, np.full(number, 1 / number), size=size)
        values.append(rows.values(counts.astype(np.float64) @ rows.sums))
    return np.concatenate(values)
