"""Exponentials of rows of logits on a CPU, compiled with numba: a logit is read from memory and written once.

A row's result is independent of the other rows and of the number of threads. Rows are contiguous: float32, or bfloat16
as the bits of its numbers. Axes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stillhouse.protos.tensors.compiled_loop import compiled_loop
from stillhouse.protos.tensors.instructions_numba import fetch, wide_vectors

_BLOCK = 1024
"""Logits that are widened at a time, in the first cache: summed in float32, blocks in double precision."""
_HEADROOM = np.float32(57.0)
"""Binary logarithm of the largest exponential; beyond it a row's reference moves. Far from float32's range."""
LOG2_E = np.float32(1.44269504)
# 2^r = 1 + C1 r + ... + C5 r^5 for |r| <= 1/2, to 1e-7 of it: least squares.
_C1, _C2, _C3 = np.float32(0.69314688), np.float32(0.24022238), np.float32(0.05550893)
_C4, _C5 = np.float32(0.0096716983), np.float32(0.0013218672)
_ROUNDING = np.float32(3 * 2**22)
"""Added to a number, it leaves the nearest integer in the lowest bits."""
_LEAST, _NOTHING = np.float32(-125.5), np.float32(-np.inf)
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_MAGNITUDE, _BITS_OF_ONE = np.int32(0x7FFFFFFF), np.int32(0x3F800000)


def _compiled(function: Callable[..., Any]) -> Any:
    """Compiles a function as it is written, but for fused products and sums."""
    return compiled_loop(function, fastmath={"nsz", "contract"}, error_model="numpy")


def exponentials(
    logits_RV: Any, rows: slice, *, scale: float, keep: bool, references_R: Any, sums_R: Any
) -> None:
    """Fills in a reference r of each row in `rows` and its sum of e^((logit - r) scale); with `keep` these replace the logits.

    A row's reference is one of its logits, and none is above it by more than 40 / scale; -inf for a row of -inf. The sum
    of a row with NaN or +inf is NaN, and its other values are undefined.
    """
    bits = logits_RV.dtype == np.uint16
    _replace(logits_RV[rows], bits, np.float32(scale) * LOG2_E, keep, references_R[rows], sums_R[rows])


def shares(logits_RV: Any, by_row: Sequence[Any], rows: slice, *, scale: float) -> None:
    """Replaces each logit z by g e^(z scale - a) - h e^(z - b), where `by_row` are a, g, b and h [R], for the rows in `rows`."""
    bits = logits_RV.dtype == np.uint16
    _replace_by_shares(logits_RV[rows], bits, np.float32(scale), *(each[rows] for each in by_row))


@_compiled
def _replace(  # noqa: PLR0917
    logits_RV: Any, bits: Any, scale: Any, keep: Any, references_R: Any, sums_R: Any
) -> None:
    wide_vectors()
    block = np.empty(_BLOCK, np.float32)
    for row in range(len(logits_RV)):
        logits_V, reference, total = logits_RV[row], _NOTHING, 0.0
        for begin in range(0, logits_V.size, _BLOCK):
            part = logits_V[begin : begin + _BLOCK]
            _load(part, bits, block)
            fetch(logits_V, begin + _BLOCK, _BLOCK)
            highest = _highest(block, part.size)
            if reference == _NOTHING:
                reference = highest
            elif (highest - reference) * scale > _HEADROOM:
                factor = power_of_two((reference - highest) * scale)
                total *= np.float64(factor)
                if keep:
                    _multiply(logits_V[:begin], bits, factor)
                reference = highest
            if reference == _NOTHING:
                block[:] = _ZERO
            else:
                total += np.float64(_sum_powers(block, part.size, reference, scale))
            if keep:
                _store(part, bits, block)
        references_R[row], sums_R[row] = reference, total


@_compiled
def _replace_by_shares(  # noqa: PLR0917
    logits_RV: Any, bits: Any, scale: Any, log_rest_R: Any, rest_R: Any, log_total_R: Any, plain_R: Any
) -> None:
    wide_vectors()
    block = np.empty(_BLOCK, np.float32)
    for row in range(len(logits_RV)):
        logits_V = logits_RV[row]
        log_rest, rest, log_total, plain = log_rest_R[row], rest_R[row], log_total_R[row], plain_R[row]
        for begin in range(0, logits_V.size, _BLOCK):
            part = logits_V[begin : begin + _BLOCK]
            _load(part, bits, block)
            fetch(logits_V, begin + _BLOCK, _BLOCK)
            for place in range(part.size):
                logit = block[place]
                share = rest * power_of_two((logit * scale - log_rest) * LOG2_E)
                block[place] = share - plain * power_of_two((logit - log_total) * LOG2_E)
            _store(part, bits, block)


@_compiled
def number_at(logits_V: Any, place: Any, bits: Any) -> Any:
    """One number of a row, in float32."""
    return _wide(logits_V[place]) if bits else np.float32(logits_V[place])


@_compiled
def put_number(logits_V: Any, place: Any, bits: Any, number: Any) -> None:
    """Overwrites one number of a row."""
    if bits:
        logits_V[place] = _narrow(number)
    else:
        logits_V[place] = number


@_compiled
def power_of_two(exponent: Any) -> Any:
    """2^exponent in float32 for exponents up to 127, 0 below -125; NaN for NaN and +inf."""
    shifted = np.float32(exponent + _ROUNDING)
    rest = exponent - np.float32(shifted - _ROUNDING)
    near = np.float32(((((_C5 * rest + _C4) * rest + _C3) * rest + _C2) * rest + _C1) * rest + _ONE)
    steps = np.int32(np.int32(shifted.view(np.int32) << np.int32(23)) + _BITS_OF_ONE).view(np.float32)
    return _ZERO if exponent <= _LEAST else near * steps


def _sum_of_powers(block: Any, count: Any, reference: Any, scale: Any) -> Any:
    """Replaces logits by powers; their sum."""
    wide_vectors()
    total = _ZERO
    for place in range(count):
        power = power_of_two(np.float32((block[place] - reference) * scale))
        total += power
        block[place] = power
    return total


_sum_powers = compiled_loop(
    _sum_of_powers, fastmath={"nsz", "contract", "reassoc"}, error_model="numpy"
)  # in any order


@_compiled
def _highest(block: Any, count: Any) -> Any:
    """The highest number, compared as integers of the same order; a NaN counts as high or low by its sign."""
    wide_vectors()
    highest = np.int32(~_MAGNITUDE)
    for place in range(count):
        number = np.float32(block[place]).view(np.int32)
        key = np.int32(number ^ np.int32((number >> np.int32(31)) & _MAGNITUDE))
        highest = np.int32(max(highest, key))
    return np.int32(highest ^ np.int32((highest >> np.int32(31)) & _MAGNITUDE)).view(np.float32)


@_compiled
def _load(part: Any, bits: Any, block: Any) -> None:
    """Widens a part of a row."""
    wide_vectors()
    if bits:
        for place in range(part.size):
            block[place] = _wide(part[place])
    else:
        for place in range(part.size):
            block[place] = part[place]


@_compiled
def _store(part: Any, bits: Any, block: Any) -> None:
    """Rounds a part of a row."""
    wide_vectors()
    if bits:
        for place in range(part.size):
            part[place] = _narrow(block[place])
    else:
        for place in range(part.size):
            part[place] = block[place]


@_compiled
def _multiply(part: Any, bits: Any, factor: Any) -> None:
    if bits:
        for place in range(part.size):
            part[place] = _narrow(_wide(part[place]) * factor)
    else:
        for place in range(part.size):
            part[place] *= factor


@_compiled
def _wide(bits: Any) -> Any:
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@_compiled
def _narrow(number: Any) -> Any:
    """Bits of the nearest bfloat16, of two the larger one."""
    bits = np.float32(number).view(np.uint32)
    return np.uint16(np.uint32(bits + np.uint32(0x8000)) >> np.uint32(16))
