"""Stratified samples of logits on a CPU, compiled with numba: one pass over a row, and one over its blocks.

A row's result is independent of the batch and of the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stillhouse.teacher_service.distributions.topk_numba import compiled, exponential

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

# Axes: T positions, K excluded tokens, V vocabulary, R samples.

_BLOCK = 64
"""Ids whose probabilities are summed together."""


def ascending_ids(
    logits_TV: Float32Array,
    numbers_TR: Float64Array,
    *,
    excluded_TK: Int32Array,
    highest_T: Float32Array,
    temperature: float,
) -> Int32Array:
    """Samples [T, R] ids at numbers in [0, 1) that ascend in a row: the inverse of the cumulative distribution in order of ids.

    Never one of `excluded_TK`, of which there are fewer than V. `highest_T` is at least every other logit of its row.
    """
    ids_TR = np.empty(numbers_TR.shape, np.int32)
    _fill_ids(logits_TV, excluded_TK, highest_T, np.float32(1 / temperature), numbers_TR, ids_TR)
    return ids_TR


@compiled
def _fill_ids(  # noqa: PLR0917 - compiled code takes no keywords
    logits_TV: Any, excluded_TK: Any, highest_T: Any, scale: Any, numbers_TR: Any, ids_TR: Any
) -> None:
    vocab_size = logits_TV.shape[1]
    exps = np.empty(vocab_size, np.float32)
    sums = np.empty((vocab_size + _BLOCK - 1) // _BLOCK, np.float64)
    for row in range(len(logits_TV)):
        _exponentials(logits_TV[row], highest_T[row], scale, exps)
        for token in excluded_TK[row]:
            exps[token] = np.float32(0.0)
        _sum_blocks(exps, sums)
        _walk(exps, sums, numbers_TR[row], ids_TR[row])


@compiled
def _exponentials(logits_V: Any, highest: Any, scale: Any, exps: Any) -> None:
    for token in range(len(logits_V)):
        exps[token] = exponential((logits_V[token] - highest) * scale)


@compiled
def _sum_blocks(exps: Any, sums: Any) -> None:
    for block in range(len(sums)):
        part = np.float32(0.0)
        for value in exps[block * _BLOCK : (block + 1) * _BLOCK]:
            part += value
        sums[block] = part


@compiled
def _walk(exps: Any, sums: Any, numbers: Any, ids: Any) -> None:
    """Finds the token under each number, which ascend, in double precision."""
    total = 0.0
    for each in sums:
        total += each
    block, before = 0, 0.0
    token, reached = 0, 0.0
    for index in range(len(numbers)):
        target = numbers[index] * total
        moved = False
        while block < len(sums) - 1 and before + sums[block] <= target:
            before += sums[block]
            block += 1
            moved = True
        if moved:
            token, reached = block * _BLOCK, before
        last = min(len(exps), (block + 1) * _BLOCK) - 1
        while token < last and reached + exps[token] <= target:
            reached += exps[token]
            token += 1
        found = token
        while exps[found] == 0 and found > 0:  # where rounding led behind the last token
            found -= 1
        while exps[found] == 0 and found < len(exps) - 1:
            found += 1
        ids[index] = found
