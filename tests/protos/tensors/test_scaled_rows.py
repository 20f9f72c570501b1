"""Log-probabilities in few bits: as near as their step, the same after another round, and refusal of bytes that lie."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.layout import decode, encode_scaled

TYPES = (Tensor.DATA_TYPE_SCALED_UINT,)


def back(tensor: Tensor) -> NDArray[np.float32]:
    received = Tensor.FromString(tensor.SerializeToString())
    found: NDArray[np.float32] = decode(received, field="x", dtypes=TYPES, shape=[None, None])
    return found


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    logprobs: NDArray[np.float64] = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logprobs


@pytest.mark.parametrize("bits", [4, 8, 12])
def test_numbers_come_back_within_half_a_step(bits: int) -> None:
    rows = log_softmax(3 * np.random.default_rng(0).normal(size=(50, 70))).astype(np.float32)
    tensor = encode_scaled(rows, bits=bits)
    assert len(tensor.data) == 50 * 4 + (50 * 70 * bits + 7) // 8
    found = back(tensor)
    step = (rows.max(axis=1) - rows.min(axis=1) + 0.02)[:, None] / (2**bits - 2)
    # FLOAT16 rounds the number, the row's highest and its step; what is nearer to 0 may have its nearest step above it.
    near = rows > -0.51 * step
    assert near.mean() < 0.02
    assert (np.abs(found - rows) <= np.where(near, 1.01, 0.51) * step + 0.02).all()
    np.testing.assert_array_equal(found.astype(np.float16).astype(np.float32), found)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_errors_of_each_number_have_the_mean_zero_over_rows(bits: int) -> None:
    """Also where every row has the same numbers but one: the grid lies elsewhere in each."""
    generator = np.random.default_rng(1)
    row = np.sort(-2 - 8 * generator.random(60))
    rows = np.repeat(row[None].astype(np.float32), 3000, axis=0)
    rows[:, 30] += generator.normal(scale=0.01, size=3000).astype(np.float32)
    errors = back(encode_scaled(rows, bits=bits)) - rows
    step = (row.max() - row.min()) / (2**bits - 2)
    assert np.abs(errors.mean(axis=0)).max() < 0.05 * step + 2e-3
    assert np.abs(errors.std(axis=0) / (step / 12**0.5) - 1).max() < 0.2


def test_eight_bits_of_a_drawn_tail_lose_less_than_a_ten_thousandth_nat() -> None:
    """The KL to the rounded distribution, normalised again, of tails as a model has them."""
    generator = np.random.default_rng(1)
    logits = -1.2 * np.log(np.arange(17, 4097)) + generator.normal(size=(200, 4080))
    exact = log_softmax(logits).astype(np.float32)
    rounded = back(encode_scaled(exact, bits=8)).astype(np.float64)
    divergence = (np.exp(exact) * (exact - log_softmax(rounded))).sum(axis=1)
    assert divergence.mean() < 2e-4


def test_a_log_probability_stays_one() -> None:
    """Also where half a step is more than its distance from 0, as beside a single kept token."""
    generator = np.random.default_rng(2)
    rows = np.stack([-0.7 * generator.random(500), -22 - generator.random(500)], axis=1).astype(np.float32)
    found = back(encode_scaled(rows, bits=4))
    assert found.max() <= 0
    assert np.abs(found - rows).max() < 24 / 14


@pytest.mark.parametrize("row", [[-2.5], [-7.0, -7.0, -7.0], []])
def test_rows_without_a_range_are_exact(row: list[float]) -> None:
    rows = np.array([row], np.float32).reshape(1, len(row))
    np.testing.assert_array_equal(back(encode_scaled(rows, bits=8)), rows)


def test_what_is_not_finite_is_not_encoded() -> None:
    for value in (np.nan, -np.inf):
        with pytest.raises(ValueError, match="finite"):
            encode_scaled(np.array([[value]], np.float32), bits=8)


def test_bytes_that_lie_are_refused() -> None:
    good = encode_scaled(np.array([[-1, -3]], np.float32), bits=8)
    infinite = np.array([np.inf, 1], "<f2").tobytes() + good.data[4:]
    below = np.array([-1, -0.5], "<f2").tobytes() + good.data[4:]
    for data, why in ((good.data[:-1], "needs 6"), (infinite, "not finite"), (below, "below 0")):
        with pytest.raises(StillhouseError, match=why):
            back(Tensor(dtype=good.dtype, shape=[1, 2], bits=8, data=data))
