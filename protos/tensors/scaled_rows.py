"""Rows of numbers <-> integers of a few bits and two numbers a row: the highest, and the step of the others below it.

A row of [T, R] is its highest number and its step, both FLOAT16, and R integers of `bits` bits: number i is
highest - step * integer i, in float32, rounded to FLOAT16. First come highest and step of all rows, then all integers.

The grid of steps lies at a place that the row's numbers choose as if at random, so that over many rows rounding errors have
the mean 0 whatever the numbers are: few bits then add noise, and no bias. Only a number of 0 and below whose nearest step lies
above 0 takes the one below that.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MIN_BITS, MAX_BITS = 2, 16
BOUND_BYTES = 4
"""Bytes of a row's highest number and step."""


def to_integers(rows: NDArray[np.float32], bits: int) -> tuple[bytes, NDArray[np.int64]]:
    """Bounds and integers, [T, R], of rows of finite numbers, each rounded to the nearest step, but none of 0 and below to one above.

    Raises ValueError for others.
    """
    if not MIN_BITS <= bits <= MAX_BITS or not np.isfinite(rows).all() or np.abs(rows).max(initial=0) > 30000:
        raise ValueError(
            f"only rows of finite numbers up to 30000 can be sent in {MIN_BITS} to {MAX_BITS} bits each"
        )
    wide, most = rows.astype(np.float64), (1 << bits) - 1
    if not wide.shape[1]:
        wide = np.zeros((len(wide), 1))
    largest = wide.max(axis=1)
    # One step more than the range needs, to place the grid in.
    step = _upwards((largest - wide.min(axis=1)) / (most - 1))
    highest = _upwards(largest + _place(rows) * step)
    divisor = np.where(step > 0, step, 1).astype(np.float64)
    integers = np.rint((highest.astype(np.float64)[:, None] - wide) / divisor[:, None])
    # A log-probability stays one.
    integers += (wide <= 0) & (highest.astype(np.float64)[:, None] > divisor[:, None] * integers)
    bounds = np.stack([highest, step], axis=1).astype("<f2").tobytes()
    return bounds, np.clip(integers, 0, most).astype(np.int64)[:, : rows.shape[1]]


def to_numbers(bounds: bytes, integers: NDArray[np.integer]) -> NDArray[np.float32]:
    """The rows again, [T, R]. Raises ValueError for bounds that are not finite, or a step below 0."""
    pairs = np.frombuffer(bounds, "<f2").reshape(-1, 2).astype(np.float32)
    if not np.isfinite(pairs).all() or (pairs[:, 1] < 0).any():
        raise ValueError("has a bound that is not finite, or a step below 0")
    with np.errstate(over="ignore"):  # below -65504 a FLOAT16 is -inf
        numbers = (pairs[:, :1] - pairs[:, 1:] * integers.astype(np.float32)).astype(np.float16)
    return numbers.astype(np.float32)


def _place(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """[T] in [0, 1), a hash of each row's numbers."""
    words = np.ascontiguousarray(rows, "<f4").view("<u4").astype(np.uint64)
    weights = np.arange(1, 2 * rows.shape[1], 2, dtype=np.uint64)
    mixed = (words * weights).sum(axis=1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    places: NDArray[np.float64] = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return places


def _upwards(numbers: NDArray[np.float64]) -> NDArray[np.float16]:
    """The least FLOAT16 that is not below each number."""
    rounded = numbers.astype(np.float16)
    return np.where(rounded < numbers, np.nextafter(rounded, np.float16(np.inf)), rounded)
