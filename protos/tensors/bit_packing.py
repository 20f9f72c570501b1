"""Unsigned integers <-> bits, `bits` each and without gaps, lowest bit first; eight of them fill `bits` whole bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MAX_BITS = 32
_BLOCK_ELEMENTS = 64 * 1024
"""Integers that are packed at once, so that scratch memory stays at 2 MiB."""


def pack(array: NDArray[Any], bits: int) -> bytes:
    """The bytes of integers in [0, 2^bits), in row-major order. Raises ValueError for others."""
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits}, outside [1, {MAX_BITS}]")
    flat = array.reshape(-1)
    if flat.dtype.kind not in "iu" or (flat.size and not (flat.min() >= 0 and int(flat.max()) < 1 << bits)):
        raise ValueError(f"only integers in [0, 2**{bits}) fit {bits} bits")
    if bits in (2, 4):  # whole elements in each byte
        per_byte = 8 // bits
        padded = np.zeros(-(-flat.size // per_byte) * per_byte, np.uint8)
        padded[: flat.size] = flat
        packed = padded[::per_byte].copy()
        for place in range(1, per_byte):
            packed |= padded[place::per_byte] << (place * bits)
        return packed.tobytes()
    pieces: list[bytes] = []
    for begin in range(0, flat.size, _BLOCK_ELEMENTS):  # every block but the last ends on a byte
        words = flat[begin : begin + _BLOCK_ELEMENTS].astype("<u4")
        unpacked = np.unpackbits(words.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little", count=bits)
        pieces.append(np.packbits(unpacked, bitorder="little").tobytes())
    return b"".join(pieces)


def unpack(data: bytes, count: int, bits: int) -> NDArray[Any]:
    """The `count` integers of ceil(count * bits / 8) bytes, int32, or int64 if `bits` is 32.

    Raises ValueError where a bit behind the last integer is set.
    """
    if count * bits % 8 and data[-1] >> (count * bits % 8):
        raise ValueError("has bits beyond its last element; send zeros there")
    num_groups = -(-count // 8)
    # An element and the bits before it in its first byte take up to 39 bits; a word is read from each first byte on.
    word = np.dtype("<u8" if bits > 25 else "<u4")
    padded = data + bytes(num_groups * bits + word.itemsize - len(data))
    groups = np.empty((num_groups, 8), word.newbyteorder("="))
    for place in range(8 if count else 0):
        first_byte, shift = divmod(place * bits, 8)
        words: NDArray[Any] = np.ndarray((num_groups,), word, padded, first_byte, (bits,))
        np.right_shift(words, word.type(shift), out=groups[:, place])
    groups &= word.type((1 << bits) - 1)
    flat = groups.reshape(-1)[:count]
    return flat.view(np.int32) if bits <= 25 else flat.astype(np.int64 if bits == MAX_BITS else np.int32)
