"""Tensors and whole answers that lie, as they would come from a hostile peer: refused in one sentence, before memory is taken."""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor, TokenDistributions
from stillhouse.protos.tensors import differences
from stillhouse.protos.tensors.differences import pack_differences
from stillhouse.protos.tensors.distributions import (
    LEVEL_BITS,
    decode,
    decode_distributions,
    encode_distributions,
)
from stillhouse.protos.tensors.falling_rows import row_bytes
from stillhouse.protos.tensors.layout import encode_differences, encode_falling
from tests.fuzz.conftest import SEED, scaled, show
from tests.fuzz.messages import arbitrary, lie, mutate, structure
from tests.protos.cache.test_format import EVERYTHING, VOCAB_SIZE, answer

REFUSALS = {Reason.TENSOR_INVALID, Reason.NON_FINITE, Reason.TOKEN_OUT_OF_RANGE}
MAX_SCRATCH_BYTES = 16 * 2**20


def test_no_tensor_is_decoded_to_what_it_does_not_hold() -> None:
    seen, count = set(), scaled(3000, 20_000)
    refused: Counter[str] = Counter()
    tracemalloc.start()
    for number in range(count):
        rng = random.Random(f"{SEED}/tensor/{number}")
        tensor = arbitrary(Tensor, rng, ())
        for _ in range(rng.randrange(1, 5)):
            lie(tensor, rng)
        dimensions = rng.randrange(4)
        dtypes = rng.sample(Tensor.DataType.values()[1:], rng.randrange(1, 8))
        shape = [rng.choice((None, None, 1, 9, len(tensor.data))) for _ in range(dimensions)]
        seen.add((structure(tensor), tuple(shape)))
        try:
            array = decode(tensor, field="x", dtypes=dtypes, shape=shape)
        except StillhouseError as error:
            refused[error.reason] += 1
        else:
            assert list(array.shape) == list(tensor.shape)
            if tensor.dtype in {Tensor.DATA_TYPE_SORTED_UINT, Tensor.DATA_TYPE_DIFFERENCES}:
                continue  # the bytes depend on the numbers
            if tensor.dtype == Tensor.DATA_TYPE_FALLING:
                num_rows, num_columns = tensor.shape
                assert len(tensor.data) == num_rows * row_bytes(num_columns, tensor.bits)
                assert (array[:, 1:] <= array[:, :-1]).all()
                continue
            bits = tensor.bits or {1: 32, 2: 64, 3: 16, 4: 32, 6: 16}[tensor.dtype]
            bounds = 4 * tensor.shape[0] if tensor.dtype == Tensor.DATA_TYPE_SCALED_UINT else 0
            assert len(tensor.data) == bounds + (array.size * bits + 7) // 8
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    show("tensors", iter([f"{count} cases, {len(seen)} structures, {refused.total()} refused"]))
    assert 0 < refused.total() < count
    assert set(refused) == {Reason.TENSOR_INVALID}
    assert peak < MAX_SCRATCH_BYTES


def test_no_queried_ids_are_taken_that_their_bytes_do_not_say() -> None:
    count, num_taken = scaled(3000, 20_000), 0
    refused: Counter[str] = Counter()
    differences.prepare()
    tracemalloc.start()
    for number in range(count):
        rng = random.Random(f"{SEED}/differences/{number}")
        shape = rng.randrange(1, 6), rng.randrange(1, 9)
        rows = np.array([[rng.choice((-1, 5, 300, 70_000, 2**31 - 1)) for _ in range(shape[1])]] * shape[0])
        data = bytearray(pack_differences(rows.astype(np.int32)))
        for _ in range(rng.randrange(3)):
            place = rng.randrange(len(data) + 1)
            data[place : place + rng.randrange(2)] = rng.randbytes(rng.randrange(2))
        if rng.random() < 0.2:
            shape = rng.choice(
                (
                    (1 << 40, 3),
                    (3, 1 << 22),
                    (1 << 20, 8),
                    (1, 1 << 22),
                    (-1, 2),
                    (0, 4),
                    (shape[0] + 1, shape[1]),
                )
            )
        tensor = Tensor(dtype=Tensor.DATA_TYPE_DIFFERENCES, shape=shape, data=bytes(data))
        try:
            found = decode(tensor, field="x", dtypes=(tensor.dtype,), shape=(None, None))
        except StillhouseError as error:
            refused[error.reason] += 1
            continue
        num_taken += 1
        assert found.shape == shape
        assert found.min(initial=-1) >= -1
        again = encode_differences(found)
        # One row can be written in several ways, of which this is the shortest.
        assert len(again.data) <= len(data)
        np.testing.assert_array_equal(
            decode(again, field="x", dtypes=(tensor.dtype,), shape=(None, None)), found
        )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    show("queried ids", iter([f"{count} cases, {refused.total()} refused"]))
    assert set(refused) == {Reason.TENSOR_INVALID}
    assert min(num_taken, refused.total()) > count // 5
    assert peak < MAX_SCRATCH_BYTES


@pytest.mark.parametrize("dtype", [Tensor.DATA_TYPE_FLOAT32, Tensor.DATA_TYPE_FALLING])
def test_no_answer_of_a_teacher_is_taken_that_can_be_no_models(dtype: Tensor.DataType.ValueType) -> None:
    one = answer(EVERYTHING)
    good = encode_distributions(one, logprob_dtype=Tensor.DATA_TYPE_FLOAT32, pack_bits=None)
    if dtype == Tensor.DATA_TYPE_FALLING:
        falling = encode_falling(one.logprobs, bits=LEVEL_BITS)
        assert falling is not None
        good.logprobs.CopyFrom(falling)
    seen, count = set(), scaled(1000, 5_000)
    refused: Counter[str] = Counter()
    for number in range(count):
        rng = random.Random(f"{SEED}/answer/{dtype}/{number}")
        message = TokenDistributions()
        message.CopyFrom(good)
        mutate(message, rng, ())
        seen.add(structure(message))
        try:
            decoded = decode_distributions(message, vocab_size=VOCAB_SIZE, max_rows=64, max_top_k=16)
        except StillhouseError as error:
            refused[error.reason] += 1
        else:
            assert decoded.token_ids.min(initial=0) >= 0
            assert decoded.token_ids.max(initial=0) < VOCAB_SIZE
            assert decoded.logprobs.max(initial=0) <= 0.01
    show("answers of a teacher", iter([f"{count} cases, {len(seen)} structures, {refused.total()} refused"]))
    assert 0 < refused.total() < count
    assert set(refused) <= REFUSALS
