"""Rows of queried ids <-> bytes: about one byte for each id of a rising row, in any order; and values of the ids alone.

`DIFFERENCES` in tensor.proto has the code. Both sides need numba: a service without it does not offer the type.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.tensors.compiled_module import compiled_module

NONE = -1
"""Stands where a row has fewer ids."""
MAX_COLUMNS = 1 << 16
_MAX_BYTES = 6
"""Bytes of a number at most."""
_REASONS = {
    -1: "has {size} bytes of data, and its rows need more",
    -2: "has a code that stands for no number from -1 to 2^31 - 1, or for one that has a shorter code",
}


def are_coded() -> bool:
    """True if this process can read and write them."""
    return compiled_module("differences_numba") is not None


def pack_differences(rows: NDArray[np.int32]) -> bytes:
    """The bytes of rows [T, Q] from -1 on. Raises ValueError for lower numbers."""
    if rows.min(initial=NONE) < NONE:
        raise ValueError(f"only rows of integers from {NONE} on are coded")
    data = np.empty(_MAX_BYTES * rows.size + 2 * len(rows), np.uint8)
    return data[: _compiled().pack(_writable(rows, np.int32), data)].tobytes()


def unpack_differences(data: bytes, num_rows: int, num_columns: int) -> NDArray[np.int32]:
    """The rows [T, Q] that `data` codes. Raises ValueError for other data, before it allocates if the data is too short for T."""
    if num_columns > MAX_COLUMNS:
        raise ValueError(f"has {num_columns} columns; send at most {MAX_COLUMNS}")
    if num_rows * min(num_columns, 2) > len(data):  # a row is two bytes, or has a byte for each number
        raise ValueError(_REASONS[-1].format(size=len(data)))
    rows = np.empty((num_rows, num_columns), np.int32)
    end = _compiled().unpack(_writable(np.frombuffer(data, np.uint8), np.uint8), rows)
    if end < 0:
        raise ValueError(_REASONS[end].format(size=len(data)))
    if end != len(data):
        raise ValueError(f"has {len(data)} bytes of data, of which {end} are used")
    return rows


def values_of_ids(values: NDArray[np.float32], rows: NDArray[np.int32]) -> NDArray[np.float32]:
    """[N]: the values [T, Q] of the ids that are not NONE, row after row."""
    found = np.empty(rows.size, np.float32)
    return found[: _compiled().gather(*_flat(values, rows), found)]


def values_in_rows(values: NDArray[np.float32], rows: NDArray[np.int32]) -> NDArray[np.float32]:
    """[T, Q]: the values [N] at their ids, as many as these are, and -inf at NONE."""
    found = np.empty(rows.size, np.float32)
    _compiled().spread(*_flat(values, rows), found)
    return found.reshape(rows.shape)


def prepare() -> None:
    """Loads the compiled loops, or compiles them: up to some seconds in a process that does so first."""
    if are_coded():
        rows = np.zeros((1, 1), np.int32)
        unpack_differences(pack_differences(rows), 1, 1)
        values_in_rows(values_of_ids(np.zeros((1, 1), np.float32), rows), rows)


def _writable(array: NDArray[Any], dtype: type[np.generic]) -> NDArray[Any]:
    """The array as the one form that is compiled, copied if need be: numba takes long to recognise one that is not to be written."""
    contiguous = np.ascontiguousarray(array, dtype)
    return contiguous if contiguous.flags.writeable else contiguous.copy()


def _flat(
    values: NDArray[np.float32], rows: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    return _writable(values, np.float32).ravel(), _writable(rows, np.int32).ravel()


def _compiled() -> ModuleType:
    module = compiled_module("differences_numba")
    if module is None:
        raise ValueError("is coded in a way that this installation, without numba, cannot read")
    return module
