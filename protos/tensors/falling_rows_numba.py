"""Levels of falling rows <-> bits, compiled with numba: the loops of falling_rows.py in one pass over a row."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.tensors.compiled_loop import compiled_loop

_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_PLACES = np.zeros(64, np.int64)
for _place in range(64):
    _PLACES[((int(_DE_BRUIJN) << _place) % 2**64) >> 58] = _place


def write_levels(
    drops: NDArray[np.float32], curve: NDArray[np.float32], bits: int, bitmaps: NDArray[np.uint8]
) -> None:
    """Rounds drops [T, K] to levels of their curves [T, 2], in place, and sets their bits in bitmaps of zeros."""
    _write(drops, curve, np.float32((1 << bits) - 1), bitmaps)


def read_levels(
    bitmaps: NDArray[np.uint8], curve: NDArray[np.float32], bits: int, numbers: NDArray[np.float32]
) -> bool:
    """Fills in numbers [T, K], for a highest number and a curve [T, 3].

    False, with some numbers undefined, if a row has not K bits set in its places.
    """
    rest = -bitmaps.shape[1] % 8
    if rest:
        bitmaps = np.pad(bitmaps, ((0, 0), (0, rest)))
        bitmaps.flags.writeable = False  # as one that is not padded: there is one form to compile
    words = np.ascontiguousarray(bitmaps).view("<u8")
    return bool(_read(words, curve, np.float32((1 << bits) - 1), numbers))


@compiled_loop
def _write(drops: Any, curve: Any, most: Any, bitmaps: Any) -> None:
    num_columns = drops.shape[1]
    levels = np.empty(num_columns, np.float32)
    for row in range(len(drops)):
        slope, bend = curve[row]
        if slope > 0:
            for column in range(num_columns):
                drop = drops[row, column]
                root = slope + np.sqrt(slope * slope + np.float32(4) * bend * drop)
                level = min(np.rint(np.float32(2) * drop / root), most)
                levels[column] = level
                drops[row, column] = level * (slope + bend * level)
        else:
            levels[:] = 0
            drops[row] = 0
        for column in range(num_columns):
            place = np.int64(levels[column]) + column
            bitmaps[row, place >> 3] |= np.uint8(1 << (place & 7))


@compiled_loop
def _read(words: Any, curve: Any, most: Any, numbers: Any) -> bool:
    num_columns = numbers.shape[1]
    for row in range(len(words)):
        count = 0
        for index in range(words.shape[1]):
            word = words[row, index]
            while word != 0:
                if count == num_columns:
                    return False
                lowest = word & (~word + np.uint64(1))
                word ^= lowest
                place = _PLACES[(lowest * _DE_BRUIJN) >> np.uint64(58)]
                numbers[row, count] = np.float32(64 * index + place - count)
                count += 1
        if count != num_columns or numbers[row, 0] != 0 or numbers[row, count - 1] > most:
            return False
        top, slope, bend = curve[row]
        for column in range(num_columns):
            level = numbers[row, column]
            number = top - level * (slope + bend * level)
            # To the 11 significant bits of a FLOAT16.
            bits = (np.float32(number).view(np.uint32) + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)
            numbers[row, column] = np.uint32(bits).view(np.float32)
    return True
