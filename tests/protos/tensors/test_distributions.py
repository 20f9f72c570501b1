"""Distributions over the wire: both codings, splitting and joining, and validation by the receiver."""

import itertools
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor, TokenDistributions
from stillhouse.protos.tensors.distributions import (
    Distributions,
    decode_distributions,
    encode,
    encode_distributions,
    packed_bits,
)

VOCAB_SIZE = 50


def sample(num_rows: int = 5, top_k: int = 4, *, everything: bool = True, seed: int = 0) -> Distributions:
    """Top-k of random distributions over 50 tokens, with every optional part."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num_rows, VOCAB_SIZE))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    token_ids = np.argsort(-logprobs, axis=1)[:, :top_k]
    kept = np.take_along_axis(logprobs, token_ids, axis=1)
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.maximum(0, 1 - np.exp(kept).sum(axis=1)))
    optional: dict[str, Any] = {
        "log_partitions": rng.normal(size=(num_rows, 2)).astype(np.float32),
        "query_logprobs": np.full((num_rows, 3), -np.inf, dtype=np.float32),
        "sampled_token_ids": rng.integers(0, VOCAB_SIZE, (num_rows, 6)).astype(np.int32),
        "sampled_logprobs": rng.normal(-3, 0.5, (num_rows, 6)).astype(np.float32),
        "entropy": np.ones(num_rows, dtype=np.float32),
        "hidden_states": rng.normal(size=(num_rows, 8)).astype(np.float32),
    }
    return Distributions(
        start=3,
        token_ids=token_ids.astype(np.int32),
        logprobs=kept.astype(np.float32),
        target_logprobs=logprobs[:, 0].astype(np.float32),
        log_tail=log_tail.astype(np.float32),
        **(optional if everything else {}),
    )


def received(message: TokenDistributions, *, max_rows: int = 100, max_top_k: int = 64) -> Distributions:
    parsed = TokenDistributions.FromString(message.SerializeToString())
    return decode_distributions(parsed, vocab_size=VOCAB_SIZE, max_rows=max_rows, max_top_k=max_top_k)


def assert_equal(one: Distributions, other: Distributions, atol: float = 0) -> None:
    for field in fields(Distributions):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert (left is None) == (right is None), field.name
        if left is not None:
            np.testing.assert_allclose(left, right, rtol=0, atol=atol, err_msg=field.name)


@given(st.integers(0, 6), st.integers(0, 9), st.booleans(), st.booleans())
def test_float32_comes_back_exactly(num_rows: int, top_k: int, everything: bool, packed: bool) -> None:
    one = sample(num_rows, top_k, everything=everything)
    bits = packed_bits(VOCAB_SIZE) if packed else None
    back = received(encode_distributions(one, logprob_dtype=Tensor.DATA_TYPE_FLOAT32, pack_bits=bits))
    assert_equal(back, one)
    assert back.token_ids.dtype == np.int32
    assert back.num_rows == num_rows


def test_float16_comes_back_as_float32_within_its_rounding() -> None:
    back = received(encode_distributions(sample()))
    assert back.logprobs.dtype == np.float32
    assert_equal(back, sample(), atol=0.004)


def test_compact_logprobs_come_back_within_their_levels_with_the_same_ids() -> None:
    one = sample(top_k=20)
    message = encode_distributions(one, logprob_dtype=Tensor.DATA_TYPE_FALLING)
    assert message.logprobs.dtype == Tensor.DATA_TYPE_FALLING
    assert message.target_logprobs.dtype == message.log_tail.dtype == Tensor.DATA_TYPE_FLOAT16
    back = received(message)
    np.testing.assert_array_equal(back.token_ids, one.token_ids)
    assert_equal(back, one, atol=0.03)
    for name in ("target_logprobs", "log_tail"):
        np.testing.assert_array_equal(getattr(back, name), getattr(one, name).astype(np.float16))


@pytest.mark.parametrize(("top_k", "odd"), [(20, "zero"), (20, "rising"), (8, ""), (1, ""), (0, "")])
def test_logprobs_that_are_not_fewer_bytes_as_compact_ones_travel_as_float16(top_k: int, odd: str) -> None:
    """Few, or with a token without probability, or one that stands behind a less likely one."""
    one = sample(top_k=top_k)
    if odd == "zero":
        one.logprobs[2, -1] = -np.inf
    elif odd == "rising":
        one.logprobs[2, -2:] = one.logprobs[2, :-3:-1].copy()
    message = encode_distributions(one, logprob_dtype=Tensor.DATA_TYPE_FALLING)
    plain = encode_distributions(one, logprob_dtype=Tensor.DATA_TYPE_FLOAT16)
    assert message.logprobs == plain.logprobs
    assert message.ByteSize() < plain.ByteSize()
    assert_equal(received(message), received(plain), atol=0.004)


def test_a_message_is_no_larger_than_row_bytes_say() -> None:
    one = sample(50, 20)
    rows = encode_distributions(one, logprob_dtype=Tensor.DATA_TYPE_FLOAT32)
    assert rows.ByteSize() <= one.row_bytes * 50 + 200


def test_logprobs_are_not_sent_as_bfloat16() -> None:
    with pytest.raises(ValueError, match="BFLOAT16"):
        encode_distributions(sample(), logprob_dtype=Tensor.DATA_TYPE_BFLOAT16)


@given(st.lists(st.integers(0, 7), max_size=5))
def test_joining_reverses_splitting(cuts: list[int]) -> None:
    one = sample(7)
    edges = [0, *sorted(cuts), 7]
    parts = [one.rows(begin, end) for begin, end in itertools.pairwise(edges)]
    assert [part.start for part in parts] == [3 + begin for begin in edges[:-1]]
    assert_equal(Distributions.concat(parts), one)


def test_parts_that_do_not_fit_are_refused() -> None:
    one = sample()
    with pytest.raises(StillhouseError, match="the rows before end at 5"):
        Distributions.concat([one.rows(0, 2), one.rows(3, 5)])
    with pytest.raises(StillhouseError, match="entropy has different columns"):
        Distributions.concat([one.rows(0, 2), replace(one.rows(2, 5), entropy=None)])
    with pytest.raises(StillhouseError, match="no parts"):
        Distributions.concat([])
    with pytest.raises(ValueError, match=r"rows \[2, 6\) of 5"):
        one.rows(2, 6)


def changed(**arrays: np.ndarray) -> Callable[[TokenDistributions], None]:
    def change(message: TokenDistributions) -> None:
        for name, array in arrays.items():
            getattr(message, name).CopyFrom(encode(array))

    return change


def single(value: float, *shape: int) -> np.ndarray:
    return np.full(shape, value, dtype=np.float32)


LIES = {
    "start is 0": lambda message: setattr(message, "start", 0),
    "start is -5": lambda message: setattr(message, "start", -5),
    "start is 2147483647": lambda message: setattr(message, "start", 2**31 - 1),
    "token_ids is missing": lambda message: message.ClearField("token_ids"),
    "logprobs is missing": lambda message: message.ClearField("logprobs"),
    "target_logprobs is missing": lambda message: message.ClearField("target_logprobs"),
    "log_tail is missing": lambda message: message.ClearField("log_tail"),
    "ids from 0 to 50; the vocabulary has 50": changed(
        token_ids=np.array([[0, 1, 2, 50]] * 5, dtype=np.int32)
    ),
    "ids from -1 to 2": changed(token_ids=np.array([[0, 1, 2, -1]] * 5, dtype=np.int32)),
    "names a token twice": changed(token_ids=np.array([[0, 1, 2, 1]] * 5, dtype=np.int32)),
    "logprobs has shape [5, 3]; send [5, 4]": changed(logprobs=single(-9, 5, 3)),
    "logprobs has shape [4, 4]; send [5, 4]": changed(logprobs=single(-9, 4, 4)),
    "logprobs has type INT32": changed(logprobs=np.zeros((5, 4), dtype=np.int32)),
    "logprobs has 0.5; a log-probability is at most 0": changed(logprobs=single(0.5, 5, 4)),
    "sum to 4": changed(logprobs=single(0, 5, 4)),
    "sum to 1.": changed(log_tail=single(0, 5)),
    "log_tail has shape [6]; send [5]": changed(log_tail=single(-9, 6)),
    "target_logprobs has 0.1": changed(target_logprobs=single(0.1, 5)),
    "target_logprobs has type INT32": changed(target_logprobs=np.zeros(5, dtype=np.int32)),
    "log_partitions has shape [4, 2]; send [5, any]": changed(log_partitions=single(0, 4, 2)),
    "query_logprobs has 1;": changed(query_logprobs=single(1, 5, 3)),
    "sampled_token_ids has ids from 99": changed(sampled_token_ids=np.full((5, 2), 99, dtype=np.int32)),
    "entropy has 2 dimensions": changed(entropy=single(1, 5, 1)),
    "hidden_states has type FLOAT16": changed(hidden_states=np.zeros((5, 8), dtype=np.float16)),
}


@pytest.mark.parametrize("said", LIES)
def test_an_inconsistent_message_is_refused_by_field_name(said: str) -> None:
    message = encode_distributions(sample())
    LIES[said](message)
    with pytest.raises(StillhouseError) as caught:
        received(message)
    assert caught.value.reason == Reason.TENSOR_INVALID
    assert said in caught.value.message


NOT_NUMBERS = {
    "logprobs": changed(logprobs=single(np.nan, 5, 4)),
    "target_logprobs": changed(target_logprobs=single(np.nan, 5)),
    "log_tail": changed(log_tail=single(np.nan, 5)),
    "log_partitions": changed(log_partitions=single(np.inf, 5, 2)),
    "query_logprobs": changed(query_logprobs=single(np.nan, 5, 3)),
    "entropy": changed(entropy=single(-np.inf, 5)),
    "hidden_states": changed(hidden_states=single(np.nan, 5, 8)),
}


@pytest.mark.parametrize("part", NOT_NUMBERS)
def test_non_finite_values_are_reported_as_such(part: str) -> None:
    message = encode_distributions(sample())
    NOT_NUMBERS[part](message)
    with pytest.raises(StillhouseError, match=rf"distributions\.{part} holds NaN") as caught:
        received(message)
    assert caught.value.reason == Reason.NON_FINITE


def test_more_than_was_requested_is_refused() -> None:
    message = encode_distributions(sample())
    with pytest.raises(StillhouseError, match=r"at most \[4, 64\]"):
        received(message, max_rows=4)
    with pytest.raises(StillhouseError, match=r"at most \[100, 3\]"):
        received(message, max_top_k=3)


def test_a_token_without_probability_is_minus_infinity_and_allowed() -> None:
    one = sample()
    certain = replace(one, logprobs=single(-np.inf, 5, 4), log_tail=single(0, 5))
    assert (received(encode_distributions(certain)).logprobs == -np.inf).all()
