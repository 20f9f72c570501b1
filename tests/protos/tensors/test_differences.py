"""Queried ids as differences: any row comes back, rising ids take about a byte each, and bytes that lie are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor, TokenDistributions
from stillhouse.protos.tensors.differences import pack_differences, unpack_differences
from stillhouse.protos.tensors.distributions import (
    Distributions,
    decode_distributions,
    encode_distributions,
)
from stillhouse.protos.tensors.layout import decode, encode_differences

LARGEST = 2**31 - 1
EDGES = [-1, 0, 1, 239, 240, 241, 2286, 2287, 2288, 67_822, 67_823, 67_824, 2**24 - 2, 2**24, LARGEST]


def back(tensor: Tensor, shape: tuple[int | None, ...] = (None, None)) -> np.ndarray:
    sent = Tensor.FromString(tensor.SerializeToString())
    return decode(sent, field="x", dtypes=(Tensor.DATA_TYPE_DIFFERENCES,), shape=shape)


def refusal(data: bytes, *shape: int, bits: int = 0) -> str:
    tensor = Tensor(dtype=Tensor.DATA_TYPE_DIFFERENCES, shape=shape, data=data, bits=bits)
    with pytest.raises(StillhouseError) as caught:
        back(tensor, (None,) * len(shape))
    return caught.value.message


@given(st.data(), st.integers(0, 9), st.integers(0, 40))
def test_decoding_reverses_encoding(data: st.DataObject, num_rows: int, num_columns: int) -> None:
    count = num_rows * num_columns
    ids = st.one_of(st.sampled_from(EDGES), st.integers(-1, 300), st.integers(0, LARGEST))
    rows = np.array(data.draw(st.lists(ids, min_size=count, max_size=count)), np.int32)
    found = back(encode_differences(rows.reshape(num_rows, num_columns)))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, rows.reshape(num_rows, num_columns))


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in EDGES for b in EDGES])
def test_each_pair_of_edges_comes_back(first: int, second: int) -> None:
    rows = np.array([[first, second], [second, first]], np.int32)
    np.testing.assert_array_equal(back(encode_differences(rows)), rows)


def test_the_bytes_are_those_of_version_1() -> None:
    rows = np.array([[7, 3, 10, 250, 2538, -1, -1], [-1, 5, 5, 0, 70_000, 1_000_000, -1]], np.int32)
    told = "08 00 05 07 f0 f9 00 00 00 00 " + "00 01 06 00 07 00 02 fa 01 11 70 fa 0e 30 d0 00 00"
    assert pack_differences(rows).hex(" ") == told
    every_column_read = np.asfortranarray(rows)[:, ::-1][:, ::-1]
    assert pack_differences(every_column_read).hex(" ") == told
    np.testing.assert_array_equal(unpack_differences(bytes.fromhex(told), 2, 7), rows)


@pytest.mark.parametrize(("vocab_size", "most"), [(32_000, 1.2), (151_936, 1.6)])
def test_rising_ids_take_about_a_byte(vocab_size: int, most: float) -> None:
    generator = np.random.default_rng(0)
    rows = np.full((50, 512), -1, np.int32)
    for row in rows:
        used = int(generator.integers(300, 513))
        row[:used] = np.sort(generator.choice(vocab_size, used, replace=False))
    assert len(pack_differences(rows)) < most * np.count_nonzero(rows >= 0)


def test_bytes_that_lie_are_refused_in_one_sentence() -> None:
    good = pack_differences(np.array([[5, 900, -1], [1, 2, 3]], np.int32))
    assert "has 7 bytes of data, and its rows need more" in refusal(good[:-1], 2, 3)
    assert "and its rows need more" in refusal(good, 3, 3)
    assert "and its rows need more" in refusal(b"\xf1", 1, 1)
    assert "and its rows need more" in refusal(b"\0", 1, 1)
    assert "has 8 bytes of data, of which 5 are used" in refusal(good, 1, 3)
    assert "of which 8 are used" in refusal(good + b"\1", 2, 3)
    for wrong in (b"\xfc\0\0\0\0", b"\xff", b"\xfa\0\0\1", b"\xfb\0\0\1\0", b"\xfb\xff\xff\xff\xff"):
        assert "has a code that stands for no number" in refusal(wrong, 1, 1)
    # A second difference beyond the largest number.
    assert "stands for no number" in refusal(b"\xfb\x80\0\0\0\1", 1, 2)
    assert "has bits = 1 with type DIFFERENCES" in refusal(good, 2, 3, bits=1)
    assert "send [rows, columns]" in refusal(good, 6)
    assert "more than the limit" in refusal(good, 1 << 20, 1 << 20)
    assert "has 65537 columns; send at most 65536" in refusal(b"\0\0", 1, 65_537)
    assert "of which 0 are used" in refusal(good, 0, 3)
    with pytest.raises(ValueError, match="from -1 on"):
        pack_differences(np.array([[-2]], np.int32))


IDS = np.array([[4, 2, -1], [-1, -1, -1], [-1, 7, 3], [1, 2, 3]], np.int32)


def answer() -> tuple[Distributions, TokenDistributions]:
    values = np.where(IDS >= 0, -1.5 - np.arange(12, dtype=np.float32).reshape(4, 3) / 8, -np.inf)
    values[3, 1] = -np.inf  # of an id that has no probability
    half = np.full((4, 1), -0.7, np.float32)
    plain = Distributions(
        start=6,
        token_ids=np.ones((4, 1), np.int32),
        logprobs=half,
        target_logprobs=half[:, 0],
        log_tail=half[:, 0],
        query_logprobs=values.astype(np.float32),
    )
    return plain, encode_distributions(plain, queried_ids=IDS)


def taken(message: TokenDistributions, queried_from: int = 6) -> Distributions:
    return decode_distributions(
        message, vocab_size=9, max_rows=4, max_top_k=1, queried_ids=IDS, queried_from=queried_from
    )


def test_answers_hold_values_of_ids_alone() -> None:
    plain, message = answer()
    assert list(message.query_logprobs.shape) == [7]
    expected = plain.query_logprobs
    assert expected is not None
    np.testing.assert_array_equal(taken(message).query_logprobs, expected)
    part = encode_distributions(plain.rows(2, 4), queried_ids=IDS[2:])
    np.testing.assert_array_equal(taken(part).query_logprobs, expected[2:])
    # A teacher of before answers all columns.
    np.testing.assert_array_equal(taken(encode_distributions(plain)).query_logprobs, expected)


@pytest.mark.parametrize(
    ("queried_from", "said"),
    [(7, "of which 0 were queried"), (5, "of which 3 were queried"), (1, "of which 0 were queried")],
)
def test_answers_of_other_positions_are_refused(queried_from: int, said: str) -> None:
    with pytest.raises(StillhouseError, match=said):
        taken(answer()[1], queried_from)


def test_answers_of_another_number_of_ids_are_refused() -> None:
    _, message = answer()
    message.query_logprobs.shape[0] = 6
    message.query_logprobs.data = message.query_logprobs.data[4:]
    with pytest.raises(StillhouseError, match=r"has shape \[6\]; send \[7\]"):
        taken(message)
    with pytest.raises(StillhouseError, match="has 1 dimensions"):
        decode_distributions(message, vocab_size=9, max_rows=4, max_top_k=1)
