"""numpy arrays as Arrow arrays and back over their buffers: pyarrow's own conversions import pandas, where that is installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def to_arrow(values: NDArray[Any]) -> pa.Array:
    """[n] numbers as an array that shares their memory, or [n] booleans as bits."""
    data = (
        np.packbits(values, bitorder="little") if values.dtype == np.bool_ else np.ascontiguousarray(values)
    )
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(data)])


def to_numpy(array: pa.Array) -> NDArray[Any]:
    """[n] numbers as an array over the same memory, or [n] booleans as a copy. Raises ValueError for nulls."""
    if array.null_count:
        raise ValueError(f"{array.null_count} of {len(array)} values are null")
    dtype = np.dtype(array.type.to_pandas_dtype())
    data = array.buffers()[1]
    if data is None or not len(array):
        return np.zeros(0, dtype)
    if dtype == np.bool_:
        first, last = array.offset, array.offset + len(array)
        bits = np.unpackbits(np.frombuffer(data, np.uint8)[: (last + 7) // 8], bitorder="little")
        return bits[first:last].astype(np.bool_)
    return np.frombuffer(data, dtype, len(array), array.offset * dtype.itemsize)
