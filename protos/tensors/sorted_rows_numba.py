"""Bits -> sorted rows, compiled with numba: the levels of sorted_rows.py in one pass over their codes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.tensors.compiled_loop import compiled_loop
from stillhouse.protos.tensors.sorted_rows import levels

_Integers = NDArray[np.int64]
Places = tuple[_Integers, _Integers, _Integers, _Integers]
"""Middles of all levels with their left and right neighbours, and the end of each level among them."""


def unpack_block(
    words: NDArray[np.uint64],
    num_bits: int,
    position: int,
    *,
    bits: int,
    out: NDArray[np.int32],
) -> int:
    """Fills in rows [T, R] from the bit at `position` on; the position behind them, -1 if more than `num_bits` are needed."""
    num_rows, num_columns = out.shape
    known = np.empty((num_columns + 2, num_rows), np.int64)
    known[0], known[-1] = 0, (1 << bits) - 1
    longer = np.empty(((num_columns + 1) // 2 * num_rows, 2), np.int64)
    end = int(_read_levels(words, num_bits, position, *_joined(num_columns), known, longer))
    out[:] = known[1:-1].T
    return end


@lru_cache(maxsize=8)
def _joined(num_columns: int) -> Places:
    """The places of all levels of a row, which has at least one."""
    middles, lefts, rights = (np.concatenate(each) for each in zip(*levels(num_columns), strict=True))
    return middles, lefts, rights, np.cumsum([len(level.middle) for level in levels(num_columns)])


@compiled_loop
def _read_levels(  # noqa: PLR0917 - compiled code takes no keywords
    words: Any,
    num_bits: Any,
    position: Any,
    middles: Any,
    lefts: Any,
    rights: Any,
    ends: Any,
    known: Any,
    longer: Any,
) -> Any:
    begin = 0
    for end in ends:
        count = 0
        for index in range(begin, end):
            middle, left, right = middles[index], lefts[index], rights[index]
            for row in range(known.shape[1]):
                low = known[left, row]
                span = known[right, row] - low
                width = max((np.float64(span).view(np.int64) >> np.int64(52)) - np.int64(1022), np.int64(0))
                if width == 0:
                    known[middle, row] = low
                    continue
                length = width - np.int64(1)
                if position + length > num_bits:
                    return -1
                word, shift = position >> 6, np.uint64(position & 63)
                # The second shift may not be by 64.
                code = (words[word] >> shift) | ((words[word + 1] << np.uint64(1)) << (np.uint64(63) - shift))
                offset = np.int64(code & ((np.uint64(1) << np.uint64(length)) - np.uint64(1)))
                position += length
                num_short = (np.int64(1) << width) - span - np.int64(1)
                if offset >= num_short:
                    offset += offset - num_short
                    longer[count, 0], longer[count, 1] = middle, row
                    count += 1
                known[middle, row] = low + offset
        if position + count > num_bits:
            return -1
        for each in range(count):
            bit = (words[position >> 6] >> np.uint64(position & 63)) & np.uint64(1)
            known[longer[each, 0], longer[each, 1]] += np.int64(bit)
            position += 1
        begin = end
    return position
