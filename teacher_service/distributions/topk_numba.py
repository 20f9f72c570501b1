"""Top-k and tail of logits on a CPU, compiled with numba: few passes over a row and no temporaries.

A row's result is independent of the batch and of the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stillhouse.protos.tensors.compiled_loop import compiled_loop
from stillhouse.protos.tensors.instructions_numba import wide_vectors

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

# Axes: T positions, K kept tokens, V vocabulary.

SUM_BLOCK = 128
"""Ids whose exponentials are summed together."""
_MIN_BLOCK, _MAX_BLOCK = 16, 128
"""Ids per block; blocks are first compared by their maxima alone."""
_BLOCKS_PER_TOKEN = 2
"""Blocks per requested token, as far as the vocabulary has them."""
_RANKED = 512
"""Most numbers that are ordered by comparing each with all."""
_LOW_BITS = 0x7FFFFFFF
_LEAST_KEY = ~0x7F7FFFFF
"""`_key` of the lowest finite number."""
# e^r = 1 + r + r^2 P(r) for |r| <= ln 2 / 2, to one unit in the last place: expf of the Cephes library.
_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ONE, _ZERO, _NOTHING = np.float32(1.0), np.float32(0.0), np.float32(-87.0)
_ROUNDING, _BITS_OF_ONE = np.float32(3 * 2**22), np.int32(0x3F800000)
"""The first, added to a number, leaves the nearest integer in the lowest bits."""


class Sums(NamedTuple):
    """Exponentials of a row's logits outside its top K, relative to the highest of these, in blocks of SUM_BLOCK ids."""

    highest: Float32Array
    """[T]."""
    blocks: Float64Array
    """[T, ceil(V / SUM_BLOCK)]."""


def heads_and_tails(
    logits_TV: Float32Array, top_k: int
) -> tuple[Int32Array, Float32Array, Float64Array, Float64Array, Sums]:
    """Computes (ids [T, K], their logits [T, K], log-sum-exp [T] of these, log-sum-exp [T] of all others, their sums by blocks).

    Ids are in falling order of logits, ties by id. Rows are contiguous; 0 < K and 16 (K + 2) <= V. The second sum is
    computed separately, not as a difference. If a logit of a row is not finite, neither is the first sum, and the
    row's other values are undefined.
    """
    num_rows, vocab_size = logits_TV.shape
    ids, values = np.empty((num_rows, top_k), np.int32), np.empty((num_rows, top_k), np.float32)
    head, rest = np.empty(num_rows, np.float64), np.empty(num_rows, np.float64)
    sums = _empty_sums(logits_TV)
    wanted = vocab_size // (_BLOCKS_PER_TOKEN * (top_k + 1))
    block = min(_MAX_BLOCK, max(_MIN_BLOCK, wanted // _MIN_BLOCK * _MIN_BLOCK))
    _fill(logits_TV, block, ids, values, head, rest, *sums)
    return ids, values, head, rest, sums


def packed_rows(
    logits_TV: Float32Array,
    targets_T: npt.NDArray[np.int64],
    sampling_T: Float32Array,
    ids: Int32Array,
    values: Float32Array,
) -> None:
    """Fills in `ids` [T, 1 + K] and `values` [T, 3 + K] as `request_plan.pack` does for rows of top-k, target and tail alone.

    Rows and K as for `heads_and_tails`; `sampling_T` are log-probabilities where the targets were sampled.
    """
    found = heads_and_tails(logits_TV, ids.shape[1] - 1)
    _pack(logits_TV, *found[:4], targets_T, sampling_T, ids, values)


def tempered_sums(
    logits_TV: Float32Array, highest_T: Float32Array, excluded_TK: Int32Array, temperature: float
) -> Sums:
    """Sums e^((logit - highest) / temperature) over all but the excluded ids, whose logits are at least `highest_T`."""
    sums = _empty_sums(logits_TV)
    sums.highest[:] = highest_T
    _fill_sums(logits_TV, excluded_TK, np.float32(1 / temperature), *sums)
    return sums


def _empty_sums(logits_TV: Float32Array) -> Sums:
    num_rows, vocab_size = logits_TV.shape
    return Sums(np.empty(num_rows, np.float32), np.empty((num_rows, -(-vocab_size // SUM_BLOCK)), np.float64))


def compiled(function: Callable[..., Any]) -> Any:
    """Compiles a function whose sums may be taken in another order."""
    return compiled_loop(function, fastmath={"reassoc", "nsz", "contract"})


def _exponential(x: Any) -> Any:
    """e^x in float32, for x up to 0; below -87 it is e^-87."""
    x = x if x > _NOTHING else _NOTHING  # one instruction, where `max` takes several for NaN
    shifted = np.float32(x * _LOG2_E + _ROUNDING)
    n = np.float32(shifted - _ROUNDING)
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_P0 * r + _P1) * r + _P2) * r + _P3) * r + _P4) * r + _P5
    power = np.int32(np.int32(shifted.view(np.int32) << np.int32(23)) + _BITS_OF_ONE).view(np.float32)
    return (p * r * r + r + _ONE) * power


exponential = compiled_loop(_exponential, fastmath={"nsz", "contract"})  # rounding needs its order of sums


@compiled
def _key(logit: Any) -> Any:
    """Maps a float to an integer of the same order; NaN is lowest with a sign bit, highest without."""
    bits = np.float32(logit).view(np.int32)
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(_LOW_BITS)))


@compiled
def _fill(  # noqa: PLR0917 - compiled code takes no keywords
    logits_TV: Any, block: int, ids: Any, values: Any, head: Any, rest: Any, following: Any, sums: Any
) -> None:
    wide_vectors()
    vocab_size, top_k = logits_TV.shape[1], ids.shape[1]
    highest = np.empty((vocab_size + block - 1) // block, np.int32)
    order = np.empty_like(highest)
    found, ordered = np.empty(vocab_size + 1, np.int64), np.empty(_RANKED, np.int64)
    for row in range(len(logits_TV)):
        logits_V = logits_TV[row]
        lowest = _highest_of_blocks(logits_V, block, highest)
        order[:] = highest
        floor = _kth_largest(order, top_k)
        num_found = _at_least(logits_V, block, highest, floor, found)
        _sort_falling(found, num_found, ordered)
        for place in range(top_k):
            token = _LOW_BITS - (found[place] & _LOW_BITS)
            ids[row, place], values[row, place] = token, logits_V[token]
        first, following[row] = values[row, 0], logits_V[_LOW_BITS - (found[top_k] & _LOW_BITS)]
        total = 0.0
        for place in range(top_k):
            total += np.exp(np.float64(values[row, place]) - np.float64(first))
        head[row] = np.log(total) + first if lowest >= _LEAST_KEY else np.nan
        rest[row] = np.log(_sum_others(logits_V, ids[row], following[row], _ONE, sums[row])) + following[row]


@compiled
def _pack(  # noqa: PLR0917 - compiled code takes no keywords
    logits_TV: Any,
    top_ids: Any,
    top: Any,
    head: Any,
    rest: Any,
    targets: Any,
    sampling: Any,
    ids: Any,
    values: Any,
) -> None:
    top_k = top.shape[1]
    for row in range(len(logits_TV)):
        higher = max(head[row], rest[row])
        lse = higher + np.log1p(np.exp(-abs(head[row] - rest[row])))
        target = targets[row]
        finite = np.isfinite(head[row]) and np.isfinite(lse)
        ids[row, 0] = target
        values[row, 0] = (
            np.float32(np.float64(logits_TV[row, target]) - lse) if finite else np.float32(np.nan)
        )
        for place in range(top_k):
            ids[row, 1 + place] = top_ids[row, place]
            values[row, 1 + place] = np.float32(np.float64(top[row, place]) - lse)
        values[row, 1 + top_k] = np.float32(rest[row] - lse)
        values[row, 2 + top_k] = sampling[row]


@compiled
def _fill_sums(logits_TV: Any, excluded_TK: Any, scale: Any, highest: Any, sums: Any) -> None:
    wide_vectors()
    for row in range(len(logits_TV)):
        _sum_others(logits_TV[row], excluded_TK[row], highest[row], scale, sums[row])


@compiled
def _highest_of_blocks(logits_V: Any, block: int, highest: Any) -> Any:
    """Fills in the highest key of each block; returns the lowest key of all."""
    wide_vectors()
    lowest = np.int32(_LOW_BITS)
    for index in range(len(highest)):
        part = logits_V[index * block : (index + 1) * block]
        top = np.int32(~_LOW_BITS)
        for place in range(part.size):  # not over the numbers themselves, which numba fetches one by one
            key = _key(part[place])
            top, lowest = np.int32(max(top, key)), np.int32(min(lowest, key))
        highest[index] = top
    return lowest


@compiled
def _kth_largest(keys: Any, k: int) -> Any:
    """Returns the key of rank k (from 0) in falling order; reorders `keys`."""
    low, high = 0, len(keys) - 1
    while low < high:
        pivot = keys[(low + high) // 2]
        left, right = low, high
        while left <= right:
            while keys[left] > pivot:
                left += 1
            while keys[right] < pivot:
                right -= 1
            if left <= right:
                keys[left], keys[right] = keys[right], keys[left]
                left += 1
                right -= 1
        if k <= right:
            high = right
        elif k >= left:
            low = left
        else:
            break
    return keys[k]


@compiled
def _at_least(logits_V: Any, block: int, highest: Any, floor: Any, found: Any) -> int:
    """Fills in key and id, packed in one integer, of the logits with keys from `floor` on; returns their number."""
    count = 0
    for index in range(len(highest)):
        if highest[index] >= floor:
            for token in range(index * block, min(len(logits_V), (index + 1) * block)):
                key = _key(logits_V[token])
                found[count] = (np.int64(key) << 32) | (_LOW_BITS - token)  # kept only if counted
                count += key >= floor
    return count


@compiled
def _sort_falling(numbers: Any, count: int, scratch: Any) -> None:
    """Sorts the first `count`, which differ: up to _RANKED by their ranks, as vectors compare many at once, more by Shellsort."""
    wide_vectors()
    if count <= _RANKED:
        part = numbers[:count]
        for index in range(count):
            number, rank = part[index], 0
            for other in range(part.size):
                rank += part[other] > number
            scratch[rank] = number
        part[:] = scratch[:count]
        return
    gap = 1
    while gap < count // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for index in range(gap, count):
            number, place = numbers[index], index
            while place >= gap and numbers[place - gap] < number:
                numbers[place] = numbers[place - gap]
                place -= gap
            numbers[place] = number
        gap //= 3


@compiled
def _sum_others(logits_V: Any, excluded: Any, highest: Any, scale: Any, sums: Any) -> float:
    """Fills in e^((logit - highest) scale) summed in blocks over the logits up to `highest` that are not excluded; their sum.

    In float32 within a block, in double over blocks.
    """
    wide_vectors()
    for block in range(len(sums)):
        logits, part = logits_V[block * SUM_BLOCK : (block + 1) * SUM_BLOCK], _ZERO
        for place in range(logits.size):
            logit = logits[place]
            part += exponential((logit - highest) * scale) if logit <= highest else _ZERO
        sums[block] = part
    for token in excluded:
        if logits_V[token] == highest:
            sums[token // SUM_BLOCK] -= 1.0
    total = 0.0
    for part in sums:
        total += part
    return total
