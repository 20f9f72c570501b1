"""The loops of differences.py, compiled with numba.

A number up to 240 is a byte. Bytes from 241 to 248 stand for 240 + 256 (byte - 241) and add the next byte; 249 for 2288, and adds
the next two, highest first; 250 and 251 for the next three and four. These are the first varints of SQLite 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stillhouse.protos.tensors.compiled_loop import compiled_loop

_ONE, _TWO, _THREE, _FOUR = 240, 2287, 67_823, (1 << 24) - 1
"""The greatest numbers of so many bytes."""
_LAST_OF_TWO = 248
"""The last first byte of a number of two."""
_END, _WRONG = -1, -2
_LARGEST = (1 << 31) - 1
_STEP = np.uint64(1)
"""Places are unsigned, so that none is looked for from the end."""


@compiled_loop
def pack(rows: Any, data: Any) -> Any:
    """Writes rows [T, Q]; the number of bytes."""
    at = np.uint64(0)
    for row in range(rows.shape[0]):
        numbers, used = rows[row], np.uint64(rows.shape[1])
        while used > 0 and numbers[used - _STEP] < 0:
            used -= _STEP
        before = np.int64(-1)
        for column in range(used):
            number = np.int64(numbers[column])
            code = number - before
            if code <= 0:
                data[at] = 0
                at += _STEP
                code = number + 2
            if code <= _TWO:
                # Whether it takes one byte or two is no branch, which a processor would often guess wrongly.
                two = np.int64(code > _ONE)
                rest = code - _ONE
                data[at] = code + two * (241 + (rest >> 8) - code)
                data[at + _STEP] = rest & 255  # overwritten, unless it takes two
                at += np.uint64(1 + two)
            else:
                at = _put(code, data, at)
            before = number
        if used < rows.shape[1]:
            data[at], data[at + _STEP] = 0, 0
            at += np.uint64(2)
    return np.int64(at)


@compiled_loop
def _put(code: Any, data: Any, at: Any) -> Any:
    """Writes a number of more than two bytes; where it ends."""
    if code <= _THREE:
        size, first, rest = 2, 249, code - _TWO - 1
    else:
        size = 3 if code <= _FOUR else 4
        first, rest = 247 + size, code
    data[at] = first
    for place in range(size, 0, -1):
        data[at + np.uint64(place)] = rest & 255
        rest >>= 8
    return at + np.uint64(size + 1)


@compiled_loop
def unpack(data: Any, rows: Any) -> Any:
    """Fills in rows [T, Q]; the number of bytes read, _END if there are too few, _WRONG for a code that is none."""
    at, size, num_columns = np.uint64(0), np.uint64(len(data)), np.uint64(rows.shape[1])
    for row in range(rows.shape[0]):
        numbers, before, column = rows[row], np.int64(-1), np.uint64(0)
        while column < num_columns:
            if at >= size:
                return np.int64(_END)
            code = np.int64(data[at])
            at += _STEP
            if code == 0:
                if at >= size:
                    return np.int64(_END)
                code = np.int64(data[at])
                at += _STEP
                if code == 0:
                    break
                before = np.int64(-2)
            if code <= _LAST_OF_TWO and at < size:
                two = np.int64(code > _ONE)
                code += two * (_ONE + ((code - 241) << 8) + np.int64(data[at]) - code)
                at += np.uint64(two)
            elif code > _ONE:
                code, at = _take(code, data, at)
                if code < 0:
                    return code
            before += code
            if before > _LARGEST:
                return np.int64(_WRONG)
            numbers[column] = before
            column += _STEP
        numbers[np.int64(column) :] = -1
    return np.int64(at)


@compiled_loop
def _take(first: Any, data: Any, at: Any) -> Any:
    """The number whose first byte is `first`, and where it ends; a negative number for the reason that there is none."""
    size = 1 if first <= _LAST_OF_TWO else first - 247
    if size > 4:
        return np.int64(_WRONG), at
    if at + np.uint64(size) > np.uint64(len(data)):
        return np.int64(_END), at
    number = np.int64(0)
    for _ in range(size):
        number = (number << 8) | np.int64(data[at])
        at += _STEP
    if size == 1:
        return _ONE + ((first - 241) << 8) + number, at
    if size == 2:
        return _TWO + 1 + number, at
    if number <= (_THREE if size == 3 else _FOUR):
        return np.int64(_WRONG), at
    return number, at


@compiled_loop
def gather(values: Any, ids: Any, found: Any) -> Any:
    """Writes the values of ids that are not -1; their number."""
    at = np.uint64(0)
    for place in range(np.uint64(len(ids))):
        found[at] = values[place]
        at += np.uint64(ids[place] >= 0)
    return np.int64(at)


@compiled_loop
def spread(values: Any, ids: Any, found: Any) -> None:
    """Writes the values, as many as there are ids, at ids that are not -1, and -inf elsewhere."""
    at = np.uint64(0)
    for place in range(np.uint64(len(ids))):
        if ids[place] >= 0:
            found[place] = values[at]
            at += _STEP
        else:
            found[place] = -np.inf
