"""Lengths of rows: percentiles and a histogram."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)
_NUM_BINS = 12


class Bin(NamedTuple):
    """Rows of a range of lengths."""

    low: int
    high: int
    """Exclusive."""
    rows: int


def percentiles(lengths: Sequence[int]) -> dict[int, int]:
    """Returns percentile to length; those are lengths that rows have."""
    values = np.percentile(np.asarray(lengths), PERCENTILES, method="inverted_cdf")
    return {each: int(value) for each, value in zip(PERCENTILES, values, strict=True)}


def histogram(lengths: Sequence[int]) -> list[Bin]:
    """Returns counts in bins of one round width (1, 2 or 5 times a power of ten), which hold all lengths."""
    low, high = min(lengths), max(lengths)
    width = next(
        step * 10**power
        for power in range(20)
        for step in (1, 2, 5)
        if high // (step * 10**power) - low // (step * 10**power) < _NUM_BINS
    )
    first = low // width
    counts = np.bincount(np.asarray(lengths) // width - first)
    return [
        Bin(low=(first + at) * width, high=(first + at + 1) * width, rows=int(rows))
        for at, rows in enumerate(counts)
    ]
