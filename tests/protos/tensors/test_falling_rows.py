"""Falling log-probabilities in three bits: few bytes, a small KL, the same bytes compiled or not, and refusal of bytes that lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors import falling_rows, layout
from stillhouse.protos.tensors.distributions import (
    LEVEL_BITS,
    Distributions,
    encode_distributions,
    packed_bits,
)
from stillhouse.protos.tensors.falling_rows import BOUND_BYTES, FIRST_STEP
from stillhouse.protos.tensors.layout import decode
from tests.support.model_rows import SHAPES, made_up

TYPES = (Tensor.DATA_TYPE_FALLING,)
MAX_KL = 1e-4
QWEN, LLAMA2 = 151_936, 32_000


def back(tensor: Tensor) -> NDArray[np.float32]:
    received = Tensor.FromString(tensor.SerializeToString())
    found: NDArray[np.float32] = decode(received, field="x", dtypes=TYPES, shape=[None, None])
    return found


def encode_falling(rows: NDArray[np.float32], *, bits: int) -> Tensor:
    tensor = layout.encode_falling(rows, bits=bits)
    assert tensor is not None
    return tensor


def refusal(tensor: Tensor) -> str:
    with pytest.raises(StillhouseError) as caught:
        back(tensor)
    return caught.value.message


@pytest.fixture(params=["compiled", "plain"])
def loops(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(falling_rows, "compiled_module", lambda _name: None)


def divergence(exact: NDArray[np.float64], found: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL of each row on the kept tokens, with the term for a sum that is not the exact one; the tail has no part in it."""
    p, q = np.exp(exact), np.exp(found.astype(np.float64))
    kl: NDArray[np.float64] = (p * (exact - found) - p + q).sum(axis=1)
    return kl


@pytest.mark.parametrize("shape", SHAPES)
def test_a_models_rows_come_back_within_a_ten_thousandth_nat(loops: None, shape: str) -> None:
    exact = made_up(shape)
    found = back(encode_falling(exact.astype(np.float32), bits=LEVEL_BITS))
    kl = divergence(exact, found)
    assert kl.min() > -1e-7
    assert kl.mean() < MAX_KL
    assert np.abs(np.exp(found).sum(axis=1) / np.exp(exact).sum(axis=1) - 1).max() < 0.005
    assert (np.diff(found, axis=1) <= 0).all()
    np.testing.assert_array_equal(found.astype(np.float16).astype(np.float32), found)


falling = st.integers(1, 40).flatmap(
    lambda width: st.lists(
        st.lists(st.floats(0, 40, width=32), min_size=width, max_size=width), min_size=1, max_size=5
    )
)


@given(falling, st.integers(4, 9))
def test_each_number_comes_back_near_and_in_order(numbers: list[list[float]], bits: int) -> None:
    rows = -np.sort(np.array(numbers, np.float32), axis=1) - np.log(np.float32(len(numbers[0])))
    tensor = encode_falling(rows, bits=bits)
    found = back(tensor)
    assert found.shape == rows.shape
    assert (np.diff(found, axis=1) <= 0).all()
    assert found.max() <= 0
    # The widest step of a row is its last; the row as a whole moves less than half of it, and FLOAT16 rounds.
    most = 2**bits - 1
    drop = rows[:, :1] - rows[:, -1:]
    widest = np.maximum(drop / most, 2 * drop / most - FIRST_STEP)
    assert (np.abs(found - rows) <= widest + 0.05).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(falling_rows, "compiled_module", lambda _name: None)
        assert encode_falling(rows, bits=bits) == tensor
        np.testing.assert_array_equal(back(tensor), found)


@pytest.mark.parametrize(("vocab_size", "most"), [(QWEN, 177), (LLAMA2, 153)])
def test_a_token_with_64_kept_takes_less_than_180_bytes(vocab_size: int, most: int) -> None:
    rows = np.repeat(made_up("zipf 1").astype(np.float32), 8, axis=0)
    ids = np.tile(np.arange(64) * (vocab_size // 64), (len(rows), 1))
    of_row = rows[:, 3]
    answer = Distributions(
        start=1, token_ids=ids.astype(np.int32), logprobs=rows, target_logprobs=of_row, log_tail=of_row
    )
    bits = packed_bits(vocab_size)
    message = encode_distributions(answer, logprob_dtype=Tensor.DATA_TYPE_FALLING, pack_bits=bits)
    assert message.ByteSize() / len(rows) < most
    float16 = encode_distributions(answer, pack_bits=bits)
    assert message.ByteSize() < 0.66 * float16.ByteSize()


@pytest.mark.parametrize(("top_k", "with_logprobs", "most"), [(0, False, 28), (1, False, 32), (0, True, 38)])
def test_twelve_draws_take_less_than_40_bytes(top_k: int, with_logprobs: bool, most: int) -> None:
    """Sorted, alone or beside the likeliest token, and with log-probabilities of 4 bits."""
    num_rows, rng = 500, np.random.default_rng(3)
    answer = Distributions(
        start=1,
        token_ids=np.ones((num_rows, top_k), np.int32),
        logprobs=np.full((num_rows, top_k), -2, np.float32),
        target_logprobs=np.full(num_rows, -2, np.float32),
        log_tail=np.full(num_rows, -0.2, np.float32),
        sampled_token_ids=rng.integers(0, QWEN, (num_rows, 12)).astype(np.int32),
        sampled_logprobs=rng.normal(-9, 1, (num_rows, 12)).astype(np.float32) if with_logprobs else None,
    )
    message = encode_distributions(
        answer, logprob_dtype=Tensor.DATA_TYPE_FALLING, pack_bits=18, sort_bits=18, sampled_logprob_bits=4
    )
    assert message.ByteSize() / num_rows < most


def test_the_bytes_of_two_rows_stay_what_they_are() -> None:
    """Bounds, and bitmaps of 19 bits, of 4 numbers on 16 levels."""
    rows = np.array([[-0.5, -1.25, -1.25, -4.0], [-0.125, -3.0, -9.0, -12.0]], np.float32)
    tensor = encode_falling(rows, bits=4)
    assert tensor.data.hex() == "2eb8004341b0f049" + "810104" + "018104"
    assert len(tensor.data) == 2 * (BOUND_BYTES + 3)
    expected = [[-0.5225, -1.2266, -1.2266, -4.0234], [-0.1329, -2.8691, -9.125, -12.0078]]
    np.testing.assert_allclose(back(tensor), expected, atol=1e-4)


@pytest.mark.parametrize("row", [[-2.5], [-7.0, -7.0, -7.0], [-1e-5, -11.5, -11.5], [0.0], []])
def test_highest_and_lowest_number_are_a_float16s(loops: None, row: list[float]) -> None:
    rows = np.array([row], np.float32).reshape(1, len(row))
    np.testing.assert_array_equal(back(encode_falling(rows, bits=7)), rows.astype(np.float16))


@pytest.mark.parametrize("row", [[-1.0, -0.5], [-1.0, -np.inf], [np.nan, -1.0], [-1.0, np.nan], [-1.0, -1e5]])
def test_other_rows_are_not_encoded(row: list[float]) -> None:
    rows = np.array([row], np.float32)
    assert falling_rows.pack_falling(rows, 7) is None


@pytest.mark.parametrize("bits", [1, 13])
def test_bits_outside_their_range_are_refused(bits: int) -> None:
    rows = np.array([[-1.0, -2.0]], np.float32)
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        encode_falling(rows, bits=bits)
    lie = encode_falling(rows, bits=4)
    lie.bits = bits
    assert f"has {bits} bits an element; send 2 to 12" in refusal(lie)


def good() -> Tensor:
    """Three rows of 4 numbers on 16 levels, of 3 bytes each."""
    return encode_falling(np.array([[-0.5, -1, -2, -8]] * 3, np.float32), bits=4)


def bounds(**changed: float) -> bytes:
    """Bounds of three rows, the second of which is changed."""
    pairs = np.array([[-0.5, 7.5]] * 3, "<f2")
    pairs[1] = changed.get("highest", pairs[1, 0]), changed.get("range", pairs[1, 1])
    return pairs.tobytes()


BITMAP = bytes([0b1111, 0, 0])
LIES = {
    "has 20 bytes of data, but shape [3, 4] needs 21": good().data[:-1],
    "has 22 bytes of data": good().data + b"\0",
    "has a bound that is not finite": bounds(highest=np.nan) + 3 * BITMAP,
    "a range below 0": bounds(range=-1) + 3 * BITMAP,
    "numbers below those of FLOAT16": bounds(highest=-6e4, range=6e4) + 3 * BITMAP,
    "not 4 bits set": bounds() + BITMAP + bytes([0b111, 0, 0]) + BITMAP,
    "not 4 bits set, of which": bounds() + BITMAP + bytes([0b111, 0, 0]) + bytes([0b11111, 0, 0]),
    "the first is its first": bounds() + 2 * BITMAP + bytes([0b11110, 0, 0]),
    "none is behind its last": bounds() + 2 * BITMAP + bytes([0b111, 0, 0b1000]),
}


@pytest.mark.parametrize("said", LIES)
def test_bytes_that_lie_are_refused(loops: None, said: str) -> None:
    tensor = good()
    tensor.data = LIES[said]
    assert said in refusal(tensor)
    tensor.data = bounds() + 2 * BITMAP + bytes([0b111, 0, 0b100])
    assert back(tensor).shape == (3, 4)


@given(st.binary(min_size=21, max_size=21))
def test_whatever_is_taken_is_a_falling_row_of_float16(data: bytes) -> None:
    tensor = good()
    # Bitmaps of random bytes hold 4 bits too rarely.
    tensor.data = data[:12] + 3 * BITMAP
    try:
        found = back(tensor)
    except StillhouseError:
        return
    assert np.isfinite(found).all()
    assert (np.diff(found, axis=1) <= 0).all()
    np.testing.assert_array_equal(found.astype(np.float16).astype(np.float32), found)
