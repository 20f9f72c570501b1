"""Byte layout of tensors: round trips, and refusal of inconsistent messages before allocation."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.layout import MAX_ELEMENTS, decode, encode, packed_bits

ALL_TYPES = tuple(Tensor.DataType.values())[1:]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7)
PLAIN = st.sampled_from([np.int32, np.int64, np.float16, np.float32])


def refusal(tensor: Tensor, shape: list[int | None], **limits: int) -> StillhouseError:
    with pytest.raises(StillhouseError) as caught:
        decode(tensor, field="request.field", dtypes=ALL_TYPES, shape=shape, **limits)
    assert caught.value.reason == Reason.TENSOR_INVALID
    assert caught.value.message.startswith("request.field ")
    return caught.value


@given(PLAIN.flatmap(lambda dtype: hnp.arrays(dtype, SHAPES)))
def test_decoding_reverses_encoding(array: np.ndarray) -> None:
    tensor = Tensor.FromString(encode(array).SerializeToString())
    back = decode(tensor, field="x", dtypes=ALL_TYPES, shape=[None] * array.ndim)
    assert back.dtype == array.dtype
    assert back.shape == array.shape
    assert back.tobytes() == array.tobytes()


@given(st.data(), st.integers(1, 32), st.integers(0, 300))
def test_packed_integers_survive_and_take_the_fewest_bytes(
    data: st.DataObject, bits: int, count: int
) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=count, max_size=count))
    array = np.array(values, dtype=np.int64)
    tensor = encode(array, bits=bits)
    assert len(tensor.data) == math.ceil(count * bits / 8)
    back = decode(tensor, field="x", dtypes=[Tensor.DATA_TYPE_PACKED_UINT], shape=[count])
    assert back.tolist() == values
    assert back.dtype == (np.int64 if bits == 32 else np.int32)


@pytest.mark.parametrize("count", [65_535, 65_536, 65_537, 200_000])
def test_packing_in_blocks_equals_packing_at_once(count: int) -> None:
    array = np.random.default_rng(count).integers(0, 152_064, count, dtype=np.int32)
    bits = packed_bits(152_064)
    assert np.array_equal(decode(encode(array, bits=bits), field="x", dtypes=ALL_TYPES, shape=[count]), array)


def test_packed_layout_is_lowest_bit_first_without_gaps() -> None:
    assert encode(np.array([1, 2, 3], dtype=np.int32), bits=3).data == bytes([0b11_010_001, 0b0])
    assert encode(np.array([[7, 0], [0, 7]], dtype=np.int32), bits=3).data == bytes([0b00000111, 0b1110])


def test_plain_layout_is_little_endian_and_row_major() -> None:
    assert (
        encode(np.array([[1, 2], [3, 4]], dtype=np.int32).T).data.hex() == "01000000030000000200000004000000"
    )
    assert encode(np.array([1], dtype=">i4")).data.hex() == "01000000"


@pytest.mark.parametrize(
    ("size", "bits"), [(1, 1), (2, 1), (3, 2), (256, 8), (257, 9), (152_064, 18), (2**31, 31)]
)
def test_packed_bits_are_the_fewest_that_hold_every_id(size: int, bits: int) -> None:
    assert packed_bits(size) == bits


def test_a_decoded_array_is_a_read_only_view() -> None:
    back = decode(encode(np.zeros(3, dtype=np.float32)), field="x", dtypes=ALL_TYPES, shape=[3])
    assert not back.flags.writeable
    assert not back.flags.owndata


@given(hnp.arrays(np.float32, 20, elements=st.floats(-(2.0**99), 2.0**99, width=32)))
def test_bfloat16_rounds_to_nearest(array: np.ndarray) -> None:
    back = decode(encode(array, dtype=Tensor.DATA_TYPE_BFLOAT16), field="x", dtypes=ALL_TYPES, shape=[20])
    assert back.dtype == np.float32
    assert (np.abs(back - array) <= np.abs(array) * 2.0**-8 + 1e-38).all()


def test_bfloat16_keeps_infinity_and_nan() -> None:
    array = np.array([np.inf, -np.inf, np.nan, 1.0], dtype=np.float32)
    back = decode(encode(array, dtype=Tensor.DATA_TYPE_BFLOAT16), field="x", dtypes=ALL_TYPES, shape=[4])
    np.testing.assert_array_equal(back, array)


def test_a_logprob_below_float16_becomes_minus_infinity_without_a_warning() -> None:
    tensor = encode(np.array([-1e9], dtype=np.float32), dtype=Tensor.DATA_TYPE_FLOAT16)
    assert decode(tensor, field="x", dtypes=ALL_TYPES, shape=[1])[0] == -np.inf


@given(
    st.sampled_from([*Tensor.DataType.values(), 99]),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
    st.binary(max_size=64),
    st.integers(-(2**31), 2**31 - 1),
    st.integers(0, 4),
)
def test_any_message_is_decoded_or_refused_by_name(
    dtype: int, shape: list[int], data: bytes, bits: int, num_dimensions: int
) -> None:
    tensor = Tensor(dtype=dtype, shape=shape, data=data, bits=bits)  # type: ignore[arg-type]
    try:
        back = decode(tensor, field="x", dtypes=ALL_TYPES, shape=[None] * num_dimensions)
    except StillhouseError as error:
        refused = error.reason == Reason.TENSOR_INVALID and error.message.startswith("x ")
    else:
        refused = False
        assert back.shape == tuple(shape)
        assert back.size <= max(len(data) * 8, 1)
    assert refused or back.ndim == num_dimensions


HUGE = [
    ([10**9], "a claim of 10^9"),
    ([2**62, 4], "a product of 2^64, which is 0 in 64 bits"),
    ([2**32, 2**32], "likewise"),
    ([0, 10**18], "a size behind a zero"),
    ([MAX_ELEMENTS + 1], "one more than the limit"),
]


@pytest.mark.parametrize(("shape", "why"), HUGE)
@pytest.mark.parametrize("dtype", ALL_TYPES)
def test_a_huge_shape_is_refused_before_allocation(
    shape: list[int], why: str, dtype: Tensor.DataType.ValueType
) -> None:
    tensor = Tensor(
        dtype=dtype, shape=shape, data=b"1234", bits=1 if dtype == Tensor.DATA_TYPE_PACKED_UINT else 0
    )
    tracemalloc.start()
    error = refusal(tensor, [None] * len(shape))
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "limit" in error.message
    assert peak_bytes < 1_000_000, why


def test_a_long_list_of_sizes_is_refused_without_reading_it() -> None:
    tensor = Tensor(dtype=Tensor.DATA_TYPE_INT32, shape=[1] * 100_000, data=b"1234")
    assert len(refusal(tensor, [None]).message) < 200


@pytest.mark.parametrize("data", [b"", b"123", b"12345", b"12345678"])
def test_wrong_lengths_are_refused(data: bytes) -> None:
    tensor = Tensor(dtype=Tensor.DATA_TYPE_INT32, shape=[1], data=data)
    assert "needs 4" in refusal(tensor, [None]).message


def test_a_wrong_shape_names_what_is_expected() -> None:
    tensor = encode(np.zeros((2, 3), dtype=np.int32))
    assert refusal(tensor, [2, 4]).message == "request.field has shape [2, 3]; send [2, 4]."
    assert refusal(tensor, [None, 3, 1]).message == "request.field has 2 dimensions; send shape [any, 3, 1]."
    assert "negative" in refusal(Tensor(dtype=Tensor.DATA_TYPE_INT32, shape=[-1]), [None]).message
    assert "limit of 5" in refusal(tensor, [None, None], max_elements=5).message


def test_a_wrong_type_names_what_is_allowed() -> None:
    with pytest.raises(StillhouseError, match="has type FLOAT32; send INT32 or PACKED_UINT"):
        decode(
            encode(np.zeros(1, dtype=np.float32)),
            field="x",
            dtypes=[Tensor.DATA_TYPE_PACKED_UINT, Tensor.DATA_TYPE_INT32],
            shape=[1],
        )
    with pytest.raises(StillhouseError, match="has type UNSPECIFIED"):
        decode(Tensor(), field="x", dtypes=ALL_TYPES, shape=[])


@pytest.mark.parametrize("bits", [-1, 0, 33, 2**31 - 1])
def test_bits_outside_their_range_are_refused(bits: int) -> None:
    assert (
        "bits"
        in refusal(
            Tensor(dtype=Tensor.DATA_TYPE_PACKED_UINT, shape=[1], data=b"\0" * 4, bits=bits), [1]
        ).message
    )


def test_bits_that_mean_nothing_are_refused() -> None:
    assert (
        "beyond its last element"
        in refusal(Tensor(dtype=Tensor.DATA_TYPE_PACKED_UINT, shape=[1], data=b"\xff", bits=3), [1]).message
    )
    assert (
        "bits = 3"
        in refusal(Tensor(dtype=Tensor.DATA_TYPE_INT32, shape=[1], data=b"1234", bits=3), [1]).message
    )


@pytest.mark.parametrize(
    ("array", "options"),
    [
        (np.zeros(1, dtype=np.float64), {}),
        (np.zeros(1, dtype=np.int32), {"dtype": Tensor.DATA_TYPE_FLOAT16}),
        (np.zeros(1, dtype=np.float32), {"dtype": Tensor.DATA_TYPE_INT32}),
        (np.array([8], dtype=np.int32), {"bits": 3}),
        (np.array([-1], dtype=np.int32), {"bits": 3}),
        (np.zeros(1, dtype=np.float32), {"bits": 3}),
        (np.zeros(1, dtype=np.int32), {"bits": 33}),
    ],
)
def test_encoding_refuses_lossy_conversions(array: np.ndarray, options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        encode(array, **options)  # type: ignore[arg-type]
