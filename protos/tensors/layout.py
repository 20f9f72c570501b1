"""numpy <-> Tensor: the only place that knows byte layout, with sorted_rows.py and scaled_rows.py; refuses a lying shape first."""

import math
import sys
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors import scaled_rows, sorted_rows

MAX_ELEMENTS = 8 * 1024 * 1024
"""Elements of a tensor that `decode` accepts unless told otherwise: 32 MiB of FLOAT32, the receive limit."""
MAX_BITS = 32
_BLOCK_ELEMENTS = 64 * 1024
"""Packed integers are handled in blocks of this many, so that scratch memory stays at 2 MiB."""
_MAX_DIMENSIONS = 8

_DTYPES: dict[Tensor.DataType.ValueType, np.dtype[Any]] = {
    Tensor.DATA_TYPE_INT32: np.dtype("<i4"),
    Tensor.DATA_TYPE_INT64: np.dtype("<i8"),
    Tensor.DATA_TYPE_FLOAT16: np.dtype("<f2"),
    Tensor.DATA_TYPE_FLOAT32: np.dtype("<f4"),
    Tensor.DATA_TYPE_BFLOAT16: np.dtype("<u2"),  # the upper half of a float32
}
_MAX_BITS: dict[Tensor.DataType.ValueType, int] = {
    Tensor.DATA_TYPE_PACKED_UINT: MAX_BITS,
    Tensor.DATA_TYPE_SORTED_UINT: sorted_rows.MAX_BITS,
    Tensor.DATA_TYPE_SCALED_UINT: scaled_rows.MAX_BITS,
}
"""Types with `bits`, and the most of these."""
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
            dtype=Tensor.DATA_TYPE_PACKED_UINT, shape=array.shape, data=_pack(array, bits), bits=bits
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


def encode_sorted(rows: NDArray[Any], *, bits: int) -> Tensor:
    """Rows [T, R] of ascending integers in [0, 2**bits) as SORTED_UINT. Raises ValueError for others."""
    data = sorted_rows.pack_sorted(rows, bits)
    return Tensor(dtype=Tensor.DATA_TYPE_SORTED_UINT, shape=rows.shape, data=data, bits=bits)


def encode_scaled(rows: NDArray[np.float32], *, bits: int) -> Tensor:
    """Rows [T, R] of finite numbers as SCALED_UINT, each rounded to a step of its row. Raises ValueError for others."""
    bounds, integers = scaled_rows.to_integers(rows, bits)
    data = bounds + _pack(integers, bits)
    return Tensor(dtype=Tensor.DATA_TYPE_SCALED_UINT, shape=rows.shape, data=data, bits=bits)


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
    PACKED_UINT comes back as int32, or as int64 if it has 32 bits, SORTED_UINT as int32, and BFLOAT16 and SCALED_UINT as
    float32.

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
    least = scaled_rows.MIN_BITS if tensor.dtype == Tensor.DATA_TYPE_SCALED_UINT else 1
    if most and not least <= tensor.bits <= most:
        raise _invalid(field, f"has {tensor.bits} bits an element; send {least} to {most}")
    if not most and tensor.bits:
        raise _invalid(field, f"has bits = {tensor.bits} with type {_dtype_name(tensor.dtype)}; send 0")
    data = tensor.data
    if tensor.dtype in {Tensor.DATA_TYPE_SORTED_UINT, Tensor.DATA_TYPE_SCALED_UINT}:
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
    """The numbers of SORTED_UINT and SCALED_UINT."""
    if len(sizes) != 2:
        raise _invalid(
            field, f"has shape {list(sizes)} with type {_dtype_name(tensor.dtype)}; send [rows, columns]"
        )
    data, (num_rows, num_columns) = tensor.data, sizes
    try:
        if tensor.dtype == Tensor.DATA_TYPE_SORTED_UINT:
            return sorted_rows.unpack_sorted(data, num_rows, num_columns, tensor.bits)
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


def _pack(array: NDArray[Any], bits: int) -> bytes:
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits is {bits}, outside [1, {MAX_BITS}]")
    flat = array.reshape(-1)
    if flat.dtype.kind not in "iu" or (flat.size and not (flat.min() >= 0 and int(flat.max()) < 1 << bits)):
        raise ValueError(f"only integers in [0, 2**{bits}) fit {bits} bits")
    pieces: list[bytes] = []
    for begin in range(0, flat.size, _BLOCK_ELEMENTS):  # every block but the last ends on a byte
        words = flat[begin : begin + _BLOCK_ELEMENTS].astype("<u4")
        unpacked = np.unpackbits(words.view(np.uint8).reshape(-1, 4), axis=1, bitorder="little", count=bits)
        pieces.append(np.packbits(unpacked, bitorder="little").tobytes())
    return b"".join(pieces)


def _unpack(data: bytes, count: int, bits: int, field: str) -> NDArray[Any]:
    if count * bits % 8 and data[-1] >> (count * bits % 8):
        raise _invalid(field, "has bits beyond its last element; send zeros there")
    out = np.empty(count, dtype=np.int64 if bits == MAX_BITS else np.int32)
    raw = np.frombuffer(data, dtype=np.uint8) if data else np.empty(0, dtype=np.uint8)
    for begin in range(0, count, _BLOCK_ELEMENTS):
        size = min(_BLOCK_ELEMENTS, count - begin)
        piece = raw[begin * bits // 8 : ((begin + size) * bits + 7) // 8]
        wide = np.zeros((size, MAX_BITS), dtype=np.uint8)
        wide[:, :bits] = np.unpackbits(piece, count=size * bits, bitorder="little").reshape(size, bits)
        out[begin : begin + size] = np.packbits(wide, axis=1, bitorder="little").view("<u4").reshape(-1)
    return out


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
