"""Stratified samples of logits on a CPU, compiled with numba: from sums over blocks of ids, one walk over a row.

A row's result is independent of the batch and of the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stillhouse.teacher_service.distributions.topk_numba import SUM_BLOCK, Sums, compiled, exponential

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

# Axes: T positions, K excluded tokens, V vocabulary, R samples.

_PART = 8
"""Ids of a block that are passed together."""


def ascending_ids(
    logits_TV: Float32Array,
    numbers_TR: Float64Array,
    *,
    sums: Sums,
    excluded_TK: Int32Array,
    temperature: float,
) -> Int32Array:
    """Samples [T, R] ids at numbers in [0, 1) that ascend in a row: the inverse of the cumulative distribution in order of ids.

    Never one of `excluded_TK`, of which there are fewer than V. `sums` are those of all other ids, at the temperature.
    """
    ids_TR = np.empty(numbers_TR.shape, np.int32)
    _fill_ids(logits_TV, excluded_TK, np.float32(1 / temperature), *sums, numbers_TR, ids_TR)
    return ids_TR


@compiled
def _fill_ids(  # noqa: PLR0917 - compiled code takes no keywords
    logits_TV: Any, excluded_TK: Any, scale: Any, highest: Any, sums: Any, numbers_TR: Any, ids_TR: Any
) -> None:
    exps = np.empty(SUM_BLOCK, np.float32)
    ends, part_ends = np.empty(_PART, np.float64), np.empty(SUM_BLOCK // _PART, np.float64)
    for row in range(len(logits_TV)):
        _walk(
            logits_TV[row],
            excluded_TK[row],
            highest[row],
            scale,
            sums[row],
            numbers_TR[row],
            exps,
            part_ends,
            ends,
            ids_TR[row],
        )


@compiled
def _fill_block(  # noqa: PLR0917 - compiled code takes no keywords
    logits_V: Any,
    begin: Any,
    excluded: Any,
    highest: Any,
    scale: Any,
    before: Any,
    exps: Any,
    part_ends: Any,
) -> None:
    """Fills in the exponentials of a block of ids from `begin` on, 0 for excluded ones and behind the last, and the cumulative
    sums behind each part."""
    logits = logits_V[begin : begin + SUM_BLOCK]
    count = logits.size
    for place in range(count):
        logit = logits[place]
        exps[place] = exponential((logit - highest) * scale) if logit <= highest else np.float32(0.0)
    exps[count:] = np.float32(0.0)
    for token in excluded:
        if begin <= token < begin + count:
            exps[token - begin] = np.float32(0.0)
    for part in range(len(part_ends)):
        total = np.float32(0.0)
        for place in range(_PART):
            total += exps[part * _PART + place]
        before += np.float64(total)
        part_ends[part] = before


@compiled
def _walk(  # noqa: PLR0917 - compiled code takes no keywords
    logits_V: Any,
    excluded: Any,
    highest: Any,
    scale: Any,
    sums: Any,
    numbers: Any,
    exps: Any,
    part_ends: Any,
    ends: Any,
    ids: Any,
) -> None:
    """Finds the token under each number, which ascend, in double precision: its block, the part of that, and its place there.

    Blocks without a token that is found are passed by their sums alone. Comparisons are counted, where branches would mislead
    the processor.
    """
    total = 0.0
    for each in sums:
        total += each
    block, before = 0, 0.0
    filled, summed = -1, -1
    for index in range(len(numbers)):
        target = numbers[index] * total
        while block < len(sums) - 1 and (before + sums[block] <= target or sums[block] <= 0):
            before += sums[block]
            block += 1
        while block > 0 and sums[block] <= 0:  # behind the last token
            block -= 1
            before -= sums[block]
        if block != filled:
            _fill_block(logits_V, block * SUM_BLOCK, excluded, highest, scale, before, exps, part_ends)
            filled, summed = block, -1
        part = 0
        for each in range(SUM_BLOCK // _PART - 1):
            part += part_ends[each] <= target
        if part != summed:
            reached = part_ends[part - 1] if part > 0 else before
            for each in range(_PART):
                reached += exps[part * _PART + each]
                ends[each] = reached
            summed = part
        found = part * _PART
        for each in range(_PART - 1):
            found += ends[each] <= target
        while found > 0 and exps[found] == 0:  # where rounding led behind the last token
            found -= 1
        while found < SUM_BLOCK - 1 and exps[found] == 0:
            found += 1
        ids[index] = block * SUM_BLOCK + found
