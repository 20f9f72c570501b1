"""Interpolative coding of sorted rows: round trips, few bytes where ids crowd, and refusal of bytes that lie."""

from __future__ import annotations

import math
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors import sorted_rows
from stillhouse.protos.tensors.layout import decode, encode_sorted, packed_bits
from stillhouse.protos.tensors.sorted_rows import COMPILED_BITS, MAX_COLUMNS, block_rows, unpack_sorted
from stillhouse.teacher_service.distributions.sorted_rows_numba import pack_block

TYPES = (Tensor.DATA_TYPE_SORTED_UINT,)


def back(tensor: Tensor) -> np.ndarray:
    return decode(Tensor.FromString(tensor.SerializeToString()), field="x", dtypes=TYPES, shape=[None, None])


def refusal(tensor: Tensor) -> str:
    with pytest.raises(StillhouseError) as caught:
        decode(tensor, field="x", dtypes=TYPES, shape=[None, None])
    return caught.value.message


@given(st.data(), st.integers(0, 9), st.integers(0, 40), st.integers(1, 31))
def test_decoding_reverses_encoding(data: st.DataObject, num_rows: int, num_columns: int, bits: int) -> None:
    numbers = st.lists(
        st.integers(0, 2**bits - 1), min_size=num_rows * num_columns, max_size=num_rows * num_columns
    )
    rows = np.sort(np.array(data.draw(numbers), np.int64).reshape(num_rows, num_columns), axis=1)
    found = back(encode_sorted(rows, bits=bits))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, rows)


@pytest.mark.parametrize(("num_rows", "num_columns"), [(1000, 90), (block_rows(7) + 1, 7), (2, MAX_COLUMNS)])
def test_rows_of_several_blocks_come_back_and_compiled_code_writes_the_same_bytes(
    num_rows: int, num_columns: int
) -> None:
    rows = np.sort(np.random.default_rng(0).integers(0, 151_936, (num_rows, num_columns)), axis=1)
    rows[:, : num_columns // 2] = rows[:, :1]  # codes without a bit among the others
    tensor = encode_sorted(rows, bits=18)
    assert tensor == encode_sorted(rows, bits=18, pack_block=pack_block)
    np.testing.assert_array_equal(back(tensor), rows)


def read_by(data: bytes, shape: tuple[int, int], bits: int) -> np.ndarray | str:
    try:
        return unpack_sorted(data, *shape, bits)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("bits", [COMPILED_BITS, 15, 18, 31])
def test_compiled_code_reads_what_the_other_reads_and_refuses_the_same(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(bits)
    cases: list[tuple[bytes, tuple[int, int]]] = []
    for shape in ((1, 1), (5, 2), (3, 192), (200, 177), (2, 20_000)):
        rows = np.sort(generator.integers(0, 1 << bits, shape), axis=1)
        rows[:, : shape[1] // 3] = rows[:, :1]
        data = encode_sorted(rows, bits=bits).data
        cases += [(data, shape), (data[:-1], shape), (data + b"\0", shape), (data[: len(data) // 2], shape)]
        cases += [(generator.bytes(len(data)), shape) for _ in range(5)]
    found = [read_by(data, shape, bits) for data, shape in cases]
    assert {type(each) for each in found} == {np.ndarray, str}
    monkeypatch.setattr(sorted_rows, "compiled_module", lambda _name: None)
    for (data, shape), each in zip(cases, found, strict=True):
        np.testing.assert_array_equal(read_by(data, shape, bits), each)


@pytest.mark.parametrize(
    ("vocab_size", "num_ids"), [(4096, 299), (32_000, 176), (151_936, 134), (151_936, 64), (151_936, 12)]
)
def test_even_ids_take_two_bits_and_the_logarithm_of_their_distance(vocab_size: int, num_ids: int) -> None:
    generator = np.random.default_rng(1)
    even = np.sort(generator.integers(0, vocab_size, (500, num_ids)), axis=1)
    tensor = encode_sorted(even, bits=packed_bits(vocab_size))
    assert 8 * len(tensor.data) / even.size < 2 + math.log2(vocab_size / num_ids)
    crowded = np.sort((vocab_size * generator.random((500, num_ids)) ** 4).astype(np.int64), axis=1)
    assert len(encode_sorted(crowded, bits=packed_bits(vocab_size)).data) < 0.9 * len(tensor.data)


def test_repeated_ids_take_nearly_nothing() -> None:
    rows = np.repeat([[3, 70_000, 151_000]], 100, axis=1)
    assert len(encode_sorted(rows, bits=18).data) < 60


def test_rows_that_fall_or_exceed_the_bits_are_not_encoded() -> None:
    for rows in ([[2, 1]], [[-1, 1]], [[1, 4]]):
        with pytest.raises(ValueError, match="ascending"):
            encode_sorted(np.array(rows), bits=2)


def test_any_bytes_are_ascending_ids_below_the_bound_or_refused() -> None:
    generator = np.random.default_rng(2)
    rows = np.sort(generator.integers(0, 1 << 12, (3, 50)), axis=1)
    good = encode_sorted(rows, bits=12)
    kept = 0
    for _ in range(2000):
        data = bytearray(good.data)
        for at in generator.integers(0, len(data), 2):
            data[at] ^= 1 << int(generator.integers(8))
        tensor = Tensor(dtype=good.dtype, shape=good.shape, bits=12, data=bytes(data))
        try:
            found = decode(tensor, field="x", dtypes=TYPES, shape=[3, 50])
        except StillhouseError:
            continue
        kept += 1
        assert found.min() >= 0
        assert found.max() < 1 << 12
        assert (found[:, 1:] >= found[:, :-1]).all()
        # One code for each row of ids: what is taken is what encoding gives.
        assert encode_sorted(found, bits=12).data == tensor.data
    assert kept > 0


def test_bytes_that_end_early_or_late_are_refused() -> None:
    good = encode_sorted(np.array([[1, 5, 9]]), bits=4)
    for data, why in (
        (good.data[:-1], "need more"),
        (good.data + b"\0", "are used"),
        (bytes([*good.data[:-1], good.data[-1] | 0x80]), "beyond its last number"),
    ):
        assert why in refusal(Tensor(dtype=good.dtype, shape=[1, 3], bits=4, data=data))
    assert "1 to 31" in refusal(Tensor(dtype=good.dtype, shape=[1, 3], bits=32, data=good.data))
    with pytest.raises(StillhouseError, match="rows, columns"):
        decode(
            Tensor(dtype=good.dtype, shape=[3], bits=4, data=good.data), field="x", dtypes=TYPES, shape=[3]
        )


def test_few_bytes_do_not_fill_the_memory() -> None:
    tracemalloc.start()
    for shape in ([1 << 22, 2], [128, MAX_COLUMNS], [1, 1 << 23], [1 << 23, 0]):
        decode_or_not(Tensor(dtype=TYPES[0], shape=shape, bits=1, data=bytes(64)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20


def decode_or_not(tensor: Tensor) -> None:
    with pytest.raises(StillhouseError):
        decode(tensor, field="x", dtypes=TYPES, shape=[None, None])


def test_a_core_decodes_two_million_ids_a_second() -> None:
    rows = np.sort(np.random.default_rng(3).integers(0, 151_936, (2000, 128)), axis=1)
    tensor = encode_sorted(rows, bits=18)
    began = time.process_time()
    back(tensor)
    assert rows.size / (time.process_time() - began) > 2e6
