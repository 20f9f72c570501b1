"""numpy <-> Tensor: the only place that knows byte layout, with its neighbours; refuses a lying shape first."""

import math
import sys
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors import bit_packing, differences, falling_rows, scaled_rows, sorted_rows

MAX_ELEMENTS = 8 * 1024 * 1024
"""Elements of a tensor that `decode` accepts unless told otherwise: 32 MiB of FLOAT32, the receive limit."""
_MAX_DIMENSIONS = 8

_DTYPES: dict[Tensor.DataType.ValueType, np.dtype[Any]] = {
    Tensor.DATA_TYPE_INT32: np.dtype("<i4"),
    Tensor.DATA_TYPE_INT64: np.dtype("<i8"),
    Tensor.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    Tensor.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    Tensor.DATA_TYPE_BFLOAT16: np.dtype("<u2"),  # the upper half of a float32
}
_MAX_BITS: dict[Tensor.DataType.ValueType, int] = {
    Tensor.DATA_TYPE_PACKED_UINT: bit_packing.MAX_BITS,
    Tensor.DATA_TYPE_SORTED_UINT: sorted_rows.MAX_BITS,
    Tensor.DATA_TYPE_SCALED_UINT: scaled_rows.MAX_BITS,
    Tensor.DATA_TYPE_FALLING: falling_rows.MAX_BITS,
}
"""Types with `bits`, and the most of these."""
_MIN_BITS: dict[Tensor.DataType.ValueType, int] = {
    Tensor.DATA_TYPE_SCALED_UINT: scaled_rows.MIN_BITS,
    Tensor.DATA_TYPE_FALLING: falling_rows.MIN_BITS,
}
_OF_ROWS = frozenset(
    {
        Tensor.DATA_TYPE_SORTED_UINT,
        Tensor.DATA_TYPE_SCALED_UINT,
        Tensor.DATA_TYPE_FALLING,
        Tensor.DATA_TYPE_DIFFERENCES,
    }
)
"""Types of rows [T, K], whose bytes are not those of their elements."""
_NATURAL: dict[np.dtype[Any], Tensor.DataType.ValueType] = {
    np.dtype(np.int32): Tensor.DATA_TYPE_INT32,
    np.dtype(np.int64): Tensor.DATA_TYPE_INT64,
    np.dtype(np.float16): Tensor.DATA_TYPE_FLOAT16,
    np.dtype(np.float32): Tensor.DATA_TYPE_FLOAT32,
}


def packed_bits(vocab_size: int) -> int:
    """The fewest bits that hold every id below `vocab_size`, in [1, 32]."""
    return max(1, (vocab_size - 1).bit_length())


def encode(
    array: NDArray[Any], *, dtype: Tensor.DataType.ValueType | None = None, bits: int | None = None
) -> Tensor:
    """The array as a Tensor of its own type, or of `dtype`, or packed to `bits` bits an element.

    Types are int32, int64, float16 and float32. `dtype` may be FLOAT16, FLOAT32 or BFLOAT16 for a
    float array, which is rounded to nearest. `bits` needs integers in [0, 2**bits). Raises ValueError
    for anything else, since only a programmer can cause it.
    """
    if bits is not None:
        return Tensor(
            dtype=Tensor.DATA_TYPE_PACKED_UINT,
            shape=array.shape,
            data=bit_packing.pack(array, bits),
            bits=bits,
        )
    own = _NATURAL.get(array.dtype.newbyteorder("="))
    if own is None:
        raise ValueError(
            f"arrays of {array.dtype} cannot be sent; use one of {', '.join(map(str, _NATURAL))}"
        )
    if dtype is None or dtype == own:
        return Tensor(dtype=own, shape=array.shape, data=array.astype(_DTYPES[own], copy=False).tobytes())
    if array.dtype.kind != "f" or dtype in {Tensor.DATA_TYPE_INT32, Tensor.DATA_TYPE_INT64}:
        raise ValueError(f"{array.dtype} cannot be sent as {Tensor.DataType.Name(dtype)}")
    if dtype == Tensor.DATA_TYPE_BFLOAT16:
        return Tensor(dtype=dtype, shape=array.shape, data=_to_bfloat16(array).tobytes())
    with np.errstate(over="ignore"):  # below -65504 a FLOAT16 log-probability is -inf
        return Tensor(dtype=dtype, shape=array.shape, data=array.astype(_DTYPES[dtype]).tobytes())


def encode_sorted(
    rows: NDArray[Any], *, bits: int, pack_block: sorted_rows.PackBlock | None = None
) -> Tensor:
    """Rows [T, R] of ascending integers in [0, 2**bits) as SORTED_UINT. Raises ValueError for others."""
    data = sorted_rows.pack_sorted(rows, bits, pack_block=pack_block)
    return Tensor(dtype=Tensor.DATA_TYPE_SORTED_UINT, shape=rows.shape, data=data, bits=bits)


def encode_scaled(rows: NDArray[np.float32], *, bits: int) -> Tensor:
    """Rows [T, R] of finite numbers as SCALED_UINT, each rounded to a step of its row. Raises ValueError for others."""
    bounds, integers = scaled_rows.to_integers(rows, bits)
    data = bounds + bit_packing.pack(integers, bits)
    return Tensor(dtype=Tensor.DATA_TYPE_SCALED_UINT, shape=rows.shape, data=data, bits=bits)


def encode_falling(rows: NDArray[np.float32], *, bits: int) -> Tensor | None:
    """Rows [T, K] of log-probabilities as FALLING on 2^bits levels; None where it cannot hold them."""
    data = falling_rows.pack_falling(rows, bits)
    if data is None:
        return None
    return Tensor(dtype=Tensor.DATA_TYPE_FALLING, shape=rows.shape, data=data, bits=bits)


def encode_differences(rows: NDArray[np.int32]) -> Tensor:
    """Rows [T, Q] of integers from -1 on as DIFFERENCES. Raises ValueError for others."""
    data = differences.pack_differences(rows)
    return Tensor(dtype=Tensor.DATA_TYPE_DIFFERENCES, shape=rows.shape, data=data)


def decode(
    tensor: Tensor,
    *,
    field: str,
    dtypes: Collection[Tensor.DataType.ValueType],
    shape: Sequence[int | None],
    max_elements: int = MAX_ELEMENTS,
) -> NDArray[Any]:
    """The array of a received Tensor, a read-only view of its bytes where possible.

    `dtypes` are the types allowed; `shape` is what is expected, None where any size will do.
    PACKED_UINT comes back as int32, or as int64 if it has 32 bits, SORTED_UINT and DIFFERENCES as int32, and BFLOAT16,
    SCALED_UINT and FALLING as float32.

    Raises StillhouseError(TENSOR_INVALID), which names `field`, if type, shape and length of the data do not
    agree with each other, with what is expected or with `max_elements`. Nothing is allocated before.
    """
    if tensor.dtype not in dtypes:
        allowed = " or ".join(_dtype_name(each) for each in sorted(dtypes))
        raise _invalid(field, f"has type {_dtype_name(tensor.dtype)}; send {allowed}")
    sizes = _sizes(tensor, field, shape, max_elements)
    count = math.prod(sizes)
    packed = tensor.dtype == Tensor.DATA_TYPE_PACKED_UINT
    most = _MAX_BITS.get(tensor.dtype, 0)
    least = _MIN_BITS.get(tensor.dtype, 1)
    if most and not least <= tensor.bits <= most:
        raise _invalid(field, f"has {tensor.bits} bits an element; send {least} to {most}")
    if not most and tensor.bits:
        raise _invalid(field, f"has bits = {tensor.bits} with type {_dtype_name(tensor.dtype)}; send 0")
    data = tensor.data
    if tensor.dtype in _OF_ROWS:
        return _decode_rows(tensor, sizes, field)
    num_bytes = (count * tensor.bits + 7) // 8 if packed else count * _DTYPES[tensor.dtype].itemsize
    if len(data) != num_bytes:
        raise _invalid(field, f"has {len(data)} bytes of data, but shape {sizes} needs {num_bytes}")
    if packed:
        return _unpack(data, count, tensor.bits, field).reshape(sizes)
    if count == 0:
        return _empty(sizes, tensor.dtype)
    array: NDArray[Any] = np.frombuffer(data, dtype=_DTYPES[tensor.dtype]).reshape(sizes)
    if tensor.dtype == Tensor.DATA_TYPE_BFLOAT16:
        return _from_bfloat16(array)
    return array if sys.byteorder == "little" else array.astype(array.dtype.newbyteorder("="))


def _decode_rows(tensor: Tensor, sizes: tuple[int, ...], field: str) -> NDArray[Any]:
    """The numbers of SORTED_UINT, SCALED_UINT, FALLING and DIFFERENCES."""
    if len(sizes) != 2:
        raise _invalid(
            field, f"has shape {list(sizes)} with type {_dtype_name(tensor.dtype)}; send [rows, columns]"
        )
    data, (num_rows, num_columns) = tensor.data, sizes
    try:
        if tensor.dtype == Tensor.DATA_TYPE_SORTED_UINT:
            return sorted_rows.unpack_sorted(data, num_rows, num_columns, tensor.bits)
        if tensor.dtype == Tensor.DATA_TYPE_DIFFERENCES:
            return differences.unpack_differences(data, num_rows, num_columns)
        if tensor.dtype == Tensor.DATA_TYPE_FALLING:
            return falling_rows.unpack_falling(data, num_rows, num_columns, tensor.bits)
        behind = num_rows * scaled_rows.BOUND_BYTES
        num_bytes = behind + (num_rows * num_columns * tensor.bits + 7) // 8
        if len(data) != num_bytes:
            raise _invalid(field, f"has {len(data)} bytes of data, but shape {list(sizes)} needs {num_bytes}")
        integers = _unpack(data[behind:], num_rows * num_columns, tensor.bits, field).reshape(sizes)
        return scaled_rows.to_numbers(data[:behind], integers)
    except ValueError as error:
        raise _invalid(field, str(error)) from None


def _sizes(tensor: Tensor, field: str, shape: Sequence[int | None], max_elements: int) -> tuple[int, ...]:
    expected = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
    if len(tensor.shape) != len(shape) or len(shape) > _MAX_DIMENSIONS:
        raise _invalid(field, f"has {len(tensor.shape)} dimensions; send shape {expected}")
    sizes = tuple(tensor.shape)
    if any(size < 0 for size in sizes):
        raise _invalid(field, f"has a negative size in its shape {list(sizes)}; send shape {expected}")
    if any(wanted is not None and size != wanted for size, wanted in zip(sizes, shape, strict=True)):
        raise _invalid(field, f"has shape {list(sizes)}; send {expected}")
    # Zero sizes count as 1, so that no other size hides behind them; Python's integers do not overflow.
    if math.prod(max(size, 1) for size in sizes) > max_elements:
        raise _invalid(
            field, f"has shape {list(sizes)}, more than the limit of {max_elements} elements; send fewer rows"
        )
    return sizes


def _empty(sizes: tuple[int, ...], dtype: Tensor.DataType.ValueType) -> NDArray[Any]:
    native = np.float32 if dtype == Tensor.DATA_TYPE_BFLOAT16 else _DTYPES[dtype].newbyteorder("=")
    return np.empty(sizes, dtype=native)


def _unpack(data: bytes, count: int, bits: int, field: str) -> NDArray[Any]:
    try:
        return bit_packing.unpack(data, count, bits)
    except ValueError as error:
        raise _invalid(field, str(error)) from None


def _to_bfloat16(array: NDArray[Any]) -> NDArray[np.uint16]:
    """The upper halves of float32 numbers, rounded to nearest, ties to even; NaN stays NaN."""
    single = np.ascontiguousarray(array, dtype="<f4")
    words = single.view("<u4")
    rounded = (words.astype(np.uint64) + 0x7FFF + ((words >> 16) & 1)) >> 16
    return np.where(np.isnan(single), 0x7FC0, rounded).astype("<u2")


def _from_bfloat16(halves: NDArray[Any]) -> NDArray[np.float32]:
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _dtype_name(dtype: int) -> str:
    known = Tensor.DataType.DESCRIPTOR.values_by_number.get(dtype)
    return known.name.removeprefix("DATA_TYPE_") if known else str(dtype)


def _invalid(field: str, what: str) -> StillhouseError:
    return StillhouseError(Reason.TENSOR_INVALID, f"{field} {what}.", metadata={"field": field})
