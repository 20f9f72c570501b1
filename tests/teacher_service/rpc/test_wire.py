"""Bytes and messages on the wire: ids packed on request, and many samples in few messages; for Score and Generate."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import (
    LEVEL_BITS,
    Distributions,
    decode_distributions,
    packed_bits,
)
from stillhouse.protos.tensors.falling_rows import row_bytes
from stillhouse.protos.tensors.layout import encode, encode_differences
from stillhouse.teacher_service.engine import DistributionOptions
from stillhouse.teacher_service.rpc import score
from stillhouse.teacher_service.rpc.response_batcher import LINGER_S
from stillhouse.teacher_service.rpc.score_validation import WireFormat
from tests.support.programs import Program
from tests.teacher_service.calls import Teacher, distribution_config, prompt, random_ids, sequence

pytestmark = pytest.mark.model
ROWS, TOP_K = 100, 64


@pytest.fixture
def teacher(hf_teacher: Program) -> Iterator[Teacher]:
    client = Teacher(hf_teacher.target)
    yield client
    client.close()


def scored(teacher: Teacher, **config: Any) -> Any:
    one = sequence(random_ids(ROWS + 1))
    requests = [
        teacher_pb2.ScoreRequest(config=distribution_config(TOP_K, **config)),
        teacher_pb2.ScoreRequest(sequence=one),
    ]
    (result,) = [result for response in teacher.stub.Score(iter(requests)) for result in response.results]
    return result.distributions


def written(teacher: Teacher, **config: Any) -> list[Any]:
    request = teacher_pb2.GenerateRequest(
        prompts=[prompt(random_ids(5))],
        sampling=teacher_pb2.SamplingParams(max_new_tokens=20, seed=1),
        distributions=distribution_config(TOP_K, **config),
    )
    chunks = [chunk for response in teacher.stub.Generate(request) for chunk in response.chunks]
    return [chunk.distributions for chunk in chunks if len(chunk.distributions.target_logprobs.shape)]


def test_ids_are_packed_to_the_bits_of_the_vocabulary_only_on_request(teacher: Teacher) -> None:
    bits = packed_bits(teacher.info.vocab_size)
    assert bits == 9
    for answers in (
        lambda **config: [scored(teacher, **config)],
        lambda **config: written(teacher, **config),
    ):
        plain, packed = answers(), answers(pack_token_ids=True)
        assert all(each.token_ids.dtype == Tensor.DATA_TYPE_INT32 for each in plain)
        for each in packed:
            count = int(np.prod(each.token_ids.shape))
            assert each.token_ids.bits == bits
            assert len(each.token_ids.data) == -(-count * bits // 8)
        decoded = [
            np.concatenate(
                [
                    decode_distributions(
                        each, vocab_size=teacher.info.vocab_size, max_rows=512, max_top_k=TOP_K
                    ).token_ids
                    for each in several
                ]
            )
            for several in (plain, packed)
        ]
        assert np.array_equal(decoded[0], decoded[1])


@pytest.mark.parametrize(
    ("dtype", "of_logprobs"),
    [
        (Tensor.DATA_TYPE_UNSPECIFIED, TOP_K * 2 + 2 * 4),
        (Tensor.DATA_TYPE_FALLING, row_bytes(TOP_K, LEVEL_BITS) + 2 * 2),
    ],
)
def test_a_scored_token_takes_the_bytes_of_its_arrays(
    teacher: Teacher, dtype: Tensor.DataType.ValueType, of_logprobs: int
) -> None:
    answer = scored(teacher, pack_token_ids=True, logprob_dtype=dtype)
    assert answer.ByteSize() / ROWS < TOP_K * 9 / 8 + of_logprobs + 2


def test_generated_tokens_have_compact_logprobs_that_are_near_the_exact_ones(teacher: Teacher) -> None:
    found = {}
    for dtype in (Tensor.DATA_TYPE_FLOAT32, Tensor.DATA_TYPE_FALLING):
        request = teacher_pb2.GenerateRequest(
            prompts=[prompt(random_ids(5))],
            sampling=teacher_pb2.SamplingParams(max_new_tokens=24, seed=3),
            distributions=distribution_config(TOP_K, logprob_dtype=dtype, pack_token_ids=True),
            whole_samples=True,
        )
        (response,) = teacher.stub.Generate(request)
        (chunk,) = response.chunks
        assert chunk.distributions.logprobs.dtype == dtype
        found[dtype] = decode_distributions(
            chunk.distributions, vocab_size=teacher.info.vocab_size, max_rows=24, max_top_k=TOP_K
        )
    exact, near = found.values()
    np.testing.assert_array_equal(near.token_ids, exact.token_ids)
    np.testing.assert_allclose(near.logprobs, exact.logprobs, atol=0.05)
    np.testing.assert_allclose(near.target_logprobs, exact.target_logprobs, atol=0.004)


def test_concurrent_samples_share_messages(teacher: Teacher) -> None:
    num_samples, new_tokens = 32, 40
    request = teacher_pb2.GenerateRequest(
        prompts=[prompt(random_ids(5))],
        num_samples=num_samples,
        sampling=teacher_pb2.SamplingParams(max_new_tokens=new_tokens, seed=3),
        distributions=distribution_config(TOP_K),
    )
    begin = time.monotonic()
    responses = list(teacher.stub.Generate(request))
    elapsed_s = time.monotonic() - begin
    tokens = sum(
        chunk.token_ids.shape[0] if chunk.token_ids.shape else 0
        for response in responses
        for chunk in response.chunks
    )
    # One token of one sample is one chunk of the engine; a message that is not full waits for others.
    assert tokens > 500
    assert len(responses) <= elapsed_s / LINGER_S + 1
    for response in responses:
        keys = [(chunk.prompt_index, chunk.sample_index) for chunk in response.chunks]
        assert len(keys) == len(set(keys))


def queried(teacher: Teacher, query: Tensor, num_rows: int = ROWS) -> list[Any]:
    """Results about the last `num_rows` of a sequence, with queried ids."""
    one = sequence(random_ids(ROWS + 1), start=ROWS + 1 - num_rows)
    one.query_token_ids.CopyFrom(query)
    requests = [
        teacher_pb2.ScoreRequest(config=distribution_config(1)),
        teacher_pb2.ScoreRequest(sequence=one),
    ]
    return [result for response in teacher.stub.Score(iter(requests)) for result in response.results]


def query_logprobs(teacher: Teacher, results: list[Any], ids: Any = None) -> Any:
    parts = [
        decode_distributions(
            each.distributions,
            vocab_size=teacher.info.vocab_size,
            max_rows=ROWS,
            max_top_k=1,
            queried_ids=ids,
        )
        for each in results
    ]
    return Distributions.concat(parts).query_logprobs


def test_coded_queries_are_answered_with_the_values_of_their_ids(
    teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert teacher_pb2.CAPABILITY_CODED_QUERIES in teacher.info.capabilities
    generator, size = np.random.default_rng(0), teacher.info.vocab_size
    ids = np.full((ROWS, teacher.info.max_query_tokens), -1, np.int32)
    for row in ids[1:]:
        row[:4] = generator.integers(-1, size, 4)
        used = int(generator.integers(size // 2))
        row[4 : 4 + used] = np.sort(generator.choice(size, used, replace=False))
    expected = query_logprobs(teacher, queried(teacher, encode(ids)))
    results = queried(teacher, encode_differences(ids))
    assert all(len(each.distributions.query_logprobs.shape) == 1 for each in results)
    found = query_logprobs(teacher, results, ids)
    np.testing.assert_array_equal(found, expected)

    monkeypatch.setattr(score, "PART_BYTES", 20_000)
    rows = decode_distributions(
        results[0].distributions, vocab_size=size, max_rows=ROWS, max_top_k=1, queried_ids=ids
    )
    wire = WireFormat(logprob_dtype=Tensor.DATA_TYPE_FLOAT32, pack_bits=None)
    scored = score._Scored(rows=rows, queried=ids[: rows.num_rows], num_reused=5)
    parts = list(score._results(7, scored, DistributionOptions(top_k=1), wire))
    assert [each.reused_tokens for each in parts] == [0] * (len(parts) - 1) + [5]
    assert len(parts) > 5
    np.testing.assert_array_equal(query_logprobs(teacher, parts, ids), found[: rows.num_rows])


@pytest.mark.parametrize(
    ("data", "shape", "said"),
    [
        (b"\5\xf9\1\0", (1, 2), "query_token_ids[0, 1] is 2548; this model has ids in [0, "),
        (b"\5", (1, 2), "has 1 bytes of data, and its rows need more"),
        (b"\5\7\1", (1, 2), "of which 2 are used"),
        (b"\5\xff", (1, 2), "stands for no number"),
        (b"\5\7", (2, 1), "has shape [2, 1]; send [1, any]"),
        (b"\0\0", (1, 1025), "this teacher takes 1024"),
    ],
)
def test_hostile_queries_are_refused_in_one_sentence(
    teacher: Teacher, data: bytes, shape: tuple[int, int], said: str
) -> None:
    query = Tensor(dtype=Tensor.DATA_TYPE_DIFFERENCES, shape=shape, data=data)
    (result,) = queried(teacher, query, num_rows=1)
    assert said in result.error.message
    assert result.last
