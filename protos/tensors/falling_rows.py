"""Rows of falling numbers <-> 3 bits a number: a highest number and a range for each row, and a bitmap of levels below it.

A row of K numbers on L = 2^bits levels is a bitmap of K + L - 1 bits, lowest bit first, that begins on a byte: number k stands
on level l if bit l + k is set, and the first on level 0. So a row has K bits set, and its size depends on nothing else. The
levels of a row with range R lie a l + b l^2 below its highest number, with m = L - 1, a = min(FIRST_STEP, R / m) and
b = (R - m a) / m^2: evenly up to a range of FIRST_STEP m, and beyond it denser at the top, where an error weighs most. Elias, Efficient Storage and Retrieval by
Content and Address of Static Files (1974), codes ascending integers by such a bitmap.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.tensors.compiled_module import compiled_module

MIN_BITS, MAX_BITS = 2, 12
BOUND_BYTES = 4
"""Bytes of a row's highest number and range."""
FIRST_STEP = 0.04
"""Largest distance between the two highest levels, in nats."""
_LARGEST, _LOWEST = 30000.0, 65504.0
_LEAST_NORMAL = 2.0**-14
_BLOCK_BITS = 1 << 16
_Float32 = NDArray[np.float32]
_Bytes = NDArray[np.uint8]


def bitmap_bytes(num_columns: int, bits: int) -> int:
    """Bytes of the bitmap of a row of numbers."""
    return (num_columns + (1 << bits) + 6) // 8


def row_bytes(num_columns: int, bits: int) -> int:
    """Bytes of a row, with its bounds."""
    return num_columns and BOUND_BYTES + bitmap_bytes(num_columns, bits)


def pack_falling(rows: _Float32, bits: int) -> bytes | None:
    """Bounds and bitmaps of log-probabilities [T, K]; None unless they are finite, at least -30000, and fall in each row.

    The highest number of a row is moved so that its probabilities have the sum they had before they were rounded to levels.
    Raises ValueError for other bits than are allowed.
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits}, outside [{MIN_BITS}, {MAX_BITS}]")
    num_rows, num_columns = rows.shape
    if not num_columns:
        return b""
    # No comparison with NaN is true.
    falls = (rows[:, 1:] <= rows[:, :-1]).all() and (rows[:, -1] >= -_LARGEST).all()
    if not (falls and (rows[:, 0] <= _LARGEST).all()):
        return None
    bounds = np.empty((num_rows, 2), "<f2")
    bitmaps = np.zeros((num_rows, bitmap_bytes(num_columns, bits)), np.uint8)
    compiled = compiled_module("falling_rows_numba")
    for begin in range(0, num_rows, step := _block_rows(num_columns, bits)):
        block = slice(begin, begin + step)
        top = rows[block, :1]
        drops = np.subtract(top, rows[block], order="C", dtype=np.float32)
        bounds[block, 1] = drops[:, -1]
        curve = _curve(bounds[block, 1:].astype(np.float32), bits)
        sums = np.exp(-drops).sum(axis=1, keepdims=True)
        write = _write_levels if compiled is None else compiled.write_levels
        write(drops, curve, bits, bitmaps[block])
        moved = np.log(sums / np.exp(-drops).sum(axis=1, keepdims=True))
        bounds[block, :1] = np.minimum(top + moved, np.maximum(top, 0))
    return bounds.tobytes() + bitmaps.tobytes()


def unpack_falling(data: bytes, num_rows: int, num_columns: int, bits: int) -> _Float32:
    """The rows [T, K] again, as numbers that FLOAT16 holds exactly; none rises, whatever the bytes.

    Raises ValueError, before it allocates, for another length of the data, and for bounds that are not finite, a range below
    0, or a bitmap without just K bits set and these in their places.
    """
    size = bitmap_bytes(num_columns, bits)
    behind, needed = num_rows * BOUND_BYTES, num_rows * row_bytes(num_columns, bits)
    if len(data) != needed:
        raise ValueError(
            f"has {len(data)} bytes of data, but shape [{num_rows}, {num_columns}] needs {needed}"
        )
    if not num_columns:
        return np.empty((num_rows, 0), np.float32)
    bounds = np.frombuffer(data, "<f2", 2 * num_rows).reshape(-1, 2).astype(np.float32)
    highest, ranges = bounds[:, :1], bounds[:, 1:]
    if not (np.isfinite(bounds).all() and (ranges >= 0).all() and (highest - ranges >= -_LOWEST).all()):
        raise ValueError("has a bound that is not finite, a range below 0, or numbers below those of FLOAT16")
    bitmaps = np.frombuffer(data, np.uint8, offset=behind).reshape(num_rows, size)
    numbers = np.empty((num_rows, num_columns), np.float32)
    compiled = compiled_module("falling_rows_numba")
    read = _read_levels if compiled is None else compiled.read_levels
    if not read(bitmaps, np.concatenate([highest, _curve(ranges, bits)], axis=1), bits, numbers):
        raise ValueError(
            f"has a row whose bitmap has not {num_columns} bits set, of which the first is its first and none is behind its last"
        )
    # The highest number is a FLOAT16 as it is. Others that are as near to 0 have fewer bits; no two probabilities are.
    near = numbers[:, min(1, num_columns - 1)] > -_LEAST_NORMAL
    if near.any():
        numbers[near] = numbers[near].astype(np.float16)
    return numbers


def prepare() -> None:
    """Loads the compiled loops, or compiles them: up to some seconds in a process that does so first, else nothing."""
    one = np.array([[-1, -2]], np.float32)
    unpack_falling(pack_falling(one, MIN_BITS) or b"", 1, 2, MIN_BITS)


def _block_rows(num_columns: int, bits: int) -> int:
    """Rows that are coded together, whose scratch memory fits a processor's cache; at least 1."""
    return max(1, _BLOCK_BITS // (8 * bitmap_bytes(num_columns, bits)))


def _curve(ranges: _Float32, bits: int) -> _Float32:
    """Factors [T, 2] of a level and of its square, for ranges [T, 1]."""
    most = np.float32((1 << bits) - 1)
    first = np.minimum(np.float32(FIRST_STEP), ranges / most)
    return np.concatenate([first, np.maximum(ranges - most * first, 0) / (most * most)], axis=1)


def _write_levels(drops: _Float32, curve: _Float32, bits: int, bitmaps: _Bytes) -> None:
    """Rounds drops [T, K] to levels of their curves [T, 2], in place, and sets their bits."""
    first, second = curve[:, :1], curve[:, 1:]
    # The root of first l + second l^2 = drop, in a form that loses nothing where `second` is 0.
    roots = first + np.sqrt(first * first + 4 * second * drops)
    levels = np.rint(2 * drops / np.where(roots > 0, roots, 1))
    np.minimum(levels, np.float32((1 << bits) - 1), out=levels)
    drops[:] = levels * (first + second * levels)
    num_rows, num_columns = levels.shape
    width = 8 * bitmaps.shape[1]
    places = levels.astype(np.intp)
    places += width * np.arange(num_rows)[:, None] + np.arange(num_columns)
    each = np.zeros((num_rows, width), np.bool_)
    each.reshape(-1)[places.reshape(-1)] = True
    bitmaps[:] = np.packbits(each, axis=1, bitorder="little")


def _read_levels(bitmaps: _Bytes, curve: _Float32, bits: int, numbers: _Float32) -> bool:
    """Fills in numbers [T, K], for a highest number and a curve [T, 3].

    False, with some numbers undefined, if a row has not K bits set in its places.
    """
    num_columns = numbers.shape[1]
    step = _block_rows(num_columns, bits)
    starts = 8 * bitmaps.shape[1] * np.arange(min(step, len(bitmaps)))[:, None] + np.arange(num_columns)
    for begin in range(0, len(bitmaps), step):
        here = slice(begin, begin + step)
        block = numbers[here]
        set_bits = np.unpackbits(bitmaps[here], bitorder="little").view(np.bool_)
        places = np.flatnonzero(set_bits)
        if len(places) != block.size:
            return False
        np.subtract(places.reshape(block.shape), starts[: len(block)], out=block, casting="unsafe")
        if block[:, 0].any() or block[:, -1].max() >= 1 << bits:
            return False
        block *= curve[here, 1:2] + curve[here, 2:] * block
        np.subtract(curve[here, :1], block, out=block)
        words = block.view(np.uint32)  # to the 11 significant bits of a FLOAT16
        words += np.uint32(1 << 12)
        words &= np.uint32(0xFFFFE000)
    return True
