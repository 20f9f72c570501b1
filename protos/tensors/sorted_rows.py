"""Rows of ascending integers <-> bits, by binary interpolative coding: crowded and repeated numbers take few bits.

The middle number of a row is written first, then the middles of both halves, and so on: each lies between two that are
known, and takes the bits that their distance needs. Rows [T, R] are coded in blocks of `block_rows(R)`, which begin on a
byte. A block holds level after level, and a level the first middles of all rows, then the second ones, and so on. With
`range = high - low + 1` and `w = ceil(log2 range)`, the 2^w - range first offsets from `low` are written in w - 1 bits;
another offset is increased by that number and written without its lowest bit. These bits follow behind the level's others,
in the same order. Every code is lowest bit first. Moffat and Stuiver, Binary Interpolative Coding for Effective Index
Compression (2000).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.tensors.compiled_module import compiled_module

MAX_BITS = 31
COMPILED_BITS = 11
"""Bits of the numbers of the smallest vocabulary that repays the seconds of compilation."""
MAX_COLUMNS = 1 << 16
MAX_IDS_PER_BYTE = 512
"""Most numbers that a byte may stand for; beyond it a short message would fill the receiver's memory."""
_BLOCK_ELEMENTS = 1 << 15
_Integers = NDArray[np.int64]
PackBlock = Callable[[NDArray[np.integer], int], bytes]
"""Rows and bits to the bytes of a block."""


def block_rows(num_columns: int) -> int:
    """Rows that are coded together, at least 1."""
    return max(1, _BLOCK_ELEMENTS // max(1, num_columns))


def pack_sorted(rows: NDArray[np.integer], bits: int, *, pack_block: PackBlock | None = None) -> bytes:
    """The bytes of rows [T, R] in [0, 2^bits), none of which falls. Raises ValueError for others.

    `pack_block` is a faster way to the same bytes of a block of at least one number.
    """
    num_rows, num_columns = rows.shape
    if not 1 <= bits <= MAX_BITS or num_columns > MAX_COLUMNS:
        raise ValueError(
            f"rows of {num_columns} numbers of {bits} bits; at most {MAX_COLUMNS} of {MAX_BITS} are coded"
        )
    if rows.size and not (rows.min() >= 0 and rows.max() < 1 << bits and (rows[:, 1:] >= rows[:, :-1]).all()):
        raise ValueError(f"only rows of ascending integers in [0, 2**{bits}) are coded")
    size = block_rows(num_columns)
    pack_block = (pack_block if rows.size else None) or _pack_block
    return b"".join(pack_block(rows[begin : begin + size], bits) for begin in range(0, num_rows, size))


def unpack_sorted(data: bytes, num_rows: int, num_columns: int, bits: int) -> NDArray[np.int32]:
    """The rows [T, R] that `data` codes; ascending and in [0, 2^bits) whatever the bytes.

    Raises ValueError, before it allocates, for more columns or numbers a byte than the limits, and for data that ends early or
    late.
    """
    if num_columns > MAX_COLUMNS or num_rows * num_columns > MAX_IDS_PER_BYTE * len(data):
        raise ValueError(
            f"has {len(data)} bytes of data for {num_rows} x {num_columns} numbers; send at most {MAX_COLUMNS} a row and "
            f"{MAX_IDS_PER_BYTE} a byte"
        )
    stream = _Stream(data)
    out = np.empty((num_rows, num_columns), np.int32)
    size = block_rows(num_columns)
    compiled = compiled_module("sorted_rows_numba") if bits >= COMPILED_BITS else None
    for begin in range(0, num_rows, size):
        block = out[begin : begin + size]
        if compiled is None or not block.size:
            _unpack_block(stream, block, bits)
        else:
            stream.read_block(compiled, block, bits)
        stream.align()
    if stream.position != 8 * len(data):
        raise ValueError(f"has {len(data)} bytes of data, of which {stream.position // 8} are used")
    return out


def prepare() -> None:
    """Loads the compiled loop of `unpack_sorted`, or compiles it: up to some seconds in a process that does so first."""
    unpack_sorted(pack_sorted(np.zeros((1, 1), np.int32), COMPILED_BITS), 1, 1, COMPILED_BITS)


class Level(NamedTuple):
    """Places of a level's middles and of their known neighbours, in rows with a bound on either side."""

    middle: _Integers
    left: _Integers
    right: _Integers


@lru_cache(maxsize=8)
def levels(num_columns: int) -> tuple[Level, ...]:
    """The levels of a row, from its middle on."""
    levels = []
    left, right = np.zeros(1, np.int64), np.full(1, num_columns + 1, np.int64)
    while (some := right - left > 1).any():
        left, right = left[some], right[some]
        middle = (left + right) // 2
        levels.append(Level(middle, left, right))
        left, right = np.stack([left, middle], 1).ravel(), np.stack([middle, right], 1).ravel()
    return tuple(levels)


def bounded(rows: NDArray[np.integer], bits: int) -> _Integers:
    """[R + 2, T]: a row's numbers between its bounds are a column, so that those of a place lie together."""
    known = np.zeros((rows.shape[1] + 2, len(rows)), np.int64)
    known[1:-1], known[-1] = rows.T, (1 << bits) - 1
    return known


def _widths(spans: _Integers) -> tuple[_Integers, _Integers]:
    """Bits of the longer code of an offset in [0, span], and the number of offsets that take one bit less."""
    exponents = spans.astype(np.float64).view(np.int64) >> 52
    widths = np.maximum(exponents - 1022, 0)  # the bit length
    return widths, (np.int64(1) << widths) - spans - 1


def _pack_block(rows: NDArray[np.integer], bits: int) -> bytes:
    places = levels(rows.shape[1])
    if not places or not len(rows):
        return b""
    known = bounded(rows, bits)
    middle, left, right = (np.concatenate(each) for each in zip(*places, strict=True))
    low = known[left]
    widths, num_short = _widths(known[right] - low)
    offsets = known[middle] - low
    longer = (offsets >= num_short) & (widths > 0)
    offsets += num_short * longer
    codes, lengths = offsets >> longer, np.maximum(widths - 1, 0)
    parts: list[tuple[_Integers, _Integers]] = []
    begin = 0
    for level in places:
        here = slice(begin, begin + len(level.middle))
        begin = here.stop
        last = offsets[here][longer[here]] & 1
        parts += [(codes[here].ravel(), lengths[here].ravel()), (last, np.ones_like(last))]
    return _joined(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _joined(codes: _Integers, lengths: _Integers) -> bytes:
    """Codes one behind the other, each in its length of at most 31 bits."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    total = int(ends[-1])
    words = np.zeros(total // 64 + 2, np.uint64)
    word, shift, values = starts >> 6, (starts & 63).view(np.uint64), codes.view(np.uint64)
    first = np.flatnonzero(np.diff(word, prepend=-1))
    words[word[first]] = np.bitwise_or.reduceat(values << shift, first)
    split = np.flatnonzero((starts & 63) + lengths > 64)  # at most one a word
    words[word[split] + 1] |= values[split] >> (np.uint64(64) - shift[split])
    return words.astype("<u8").tobytes()[: (total + 7) // 8]


def _unpack_block(stream: _Stream, out: NDArray[np.int32], bits: int) -> None:
    known = bounded(np.zeros_like(out), bits)
    for level in levels(out.shape[1]):
        low = known[level.left]
        widths, num_short = _widths(known[level.right] - low)
        offsets = stream.read(np.maximum(widths - 1, 0))
        longer = (offsets >= num_short) & (widths > 0)
        offsets += longer * (offsets - num_short + stream.read(longer.astype(np.int64)))
        known[level.middle] = low + offsets
    out[:] = known[1:-1].T


class _Stream:
    """Reads codes of known lengths, one behind the other."""

    def __init__(self, data: bytes) -> None:
        self.position = 0
        """In bits."""
        self._data = data
        self._num_bits = 8 * len(data)
        padded = np.frombuffer(data + bytes(8), np.uint8)
        self._aligned: NDArray[np.uint64] | None = None
        """The data as words one behind the other, and one more, once there is a block for compiled code."""
        # A word of 64 bits at each byte.
        self._words: NDArray[np.uint64] = np.ndarray(len(data) + 1, "<u8", padded.data, 0, (1,))

    def read(self, lengths: _Integers) -> _Integers:
        """The next codes, of at most 31 bits, in the shape of `lengths`. Raises ValueError behind the end."""
        ends = np.cumsum(lengths).reshape(lengths.shape) + self.position
        starts = ends - lengths
        if ends.size:
            self.position = int(ends.flat[-1])
        if self.position > self._num_bits:
            raise self._too_short()
        words: _Integers = self._words[starts >> 3].view(np.int64)
        codes: _Integers = (words >> (starts & 7)) & ((np.int64(1) << lengths) - 1)
        return codes

    def read_block(self, compiled: ModuleType, out: NDArray[np.int32], bits: int) -> None:
        """Fills in a block of rows by compiled code. Raises ValueError behind the end."""
        if self._aligned is None:
            self._aligned = np.frombuffer(self._data + bytes(16 - len(self._data) % 8), "<u8")
        self.position = compiled.unpack_block(
            self._aligned, self._num_bits, self.position, bits=bits, out=out
        )
        if self.position < 0:
            raise self._too_short()

    def _too_short(self) -> ValueError:
        return ValueError(f"has {self._num_bits // 8} bytes of data, and its rows need more")

    def align(self) -> None:
        """Goes to the next byte. Raises ValueError if a bit before it is set."""
        rest = -self.position % 8
        if rest and self.read(np.array([rest]))[0]:
            raise ValueError("has bits beyond its last number; send zeros there")
