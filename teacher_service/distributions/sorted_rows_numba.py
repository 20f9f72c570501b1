"""Compiled form of the coding of sorted rows: the bytes of `protos/tensors/sorted_rows.py` in one pass over the numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.tensors.sorted_rows import bounded, levels
from stillhouse.teacher_service.distributions.topk_numba import compiled

_WORD = np.int64(64)


def pack_block(rows: NDArray[np.integer], bits: int) -> bytes:
    """The bytes of a block of rows [T, R], which are ascending integers in [0, 2^bits)."""
    known = bounded(rows, bits)
    words = np.zeros((bits * rows.size >> 6) + 2, np.uint64)
    last = np.empty(len(rows) * (rows.shape[1] // 2 + 1), np.uint64)
    position = np.zeros(1, np.int64)
    for level in levels(rows.shape[1]):
        _write_level(known, level.middle, level.left, level.right, words, last, position)
    return words.astype("<u8", copy=False).tobytes()[: (int(position[0]) + 7) // 8]


@compiled
def _write_level(  # noqa: PLR0917 - compiled code takes no keywords
    known: Any, middles: Any, lefts: Any, rights: Any, words: Any, last: Any, position: Any
) -> None:
    at, count = position[0], 0
    for index in range(len(middles)):
        middle, left, right = known[middles[index]], known[lefts[index]], known[rights[index]]
        for row in range(known.shape[1]):
            span, offset = right[row] - left[row], middle[row] - left[row]
            width = max((np.float64(span).view(np.int64) >> np.int64(52)) - np.int64(1022), np.int64(0))
            if width == 0:
                continue
            num_short = (np.int64(1) << width) - span - np.int64(1)
            if offset >= num_short:
                offset += num_short
                last[count] = np.uint64(offset & np.int64(1))
                count += 1
                offset >>= np.int64(1)
            at = _write(np.uint64(offset), width - np.int64(1), words, at)
    for index in range(count):
        at = _write(last[index], np.int64(1), words, at)
    position[0] = at


@compiled
def _write(code: Any, length: Any, words: Any, at: Any) -> Any:
    """Writes a code of at most 31 bits at bit `at`; where it ends."""
    word, shift = at >> np.int64(6), at & np.int64(63)
    words[word] |= code << np.uint64(shift)
    if shift + length > _WORD:
        words[word + 1] |= code >> np.uint64(_WORD - shift)
    return at + length
