"""Conformance of engines in scoring, over gRPC, against a float32 forward of transformers: one suite for hf and vllm."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import encode
from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint
from stillhouse.teacher_service.engines.vllm.tiers import WorkerTier
from tests.conftest import Models
from tests.support.programs import Program
from tests.teacher_service.calls import (
    Teacher,
    assert_agrees,
    distribution_config,
    prompt,
    random_ids,
    reference_logprobs,
    sequence,
)

pytestmark = pytest.mark.model


@pytest.mark.parametrize(
    ("length", "start"), [(2, 1), (17, 1), (17, 9), (17, 16), (129, 1), (512, 1), (512, 511)]
)
def test_scores_are_those_of_a_float32_forward(
    teacher: Teacher, models: Models, length: int, start: int
) -> None:
    ids = random_ids(length)
    answer = teacher.score_one(ids, start=start, top_k=64)
    assert answer.start == start
    assert_agrees(answer, ids, reference_logprobs(models.teacher, ids), top_k=64)


@pytest.mark.parametrize("top_k", [0, 1, 256])
def test_top_k_goes_from_none_to_256(teacher: Teacher, models: Models, top_k: int) -> None:
    ids = random_ids(33)
    answer = teacher.score_one(ids, top_k=top_k)
    assert_agrees(answer, ids, reference_logprobs(models.teacher, ids), top_k=top_k)
    if top_k == 0:
        assert np.abs(answer.log_tail).max() < 1e-5


def test_start_0_means_1(teacher: Teacher) -> None:
    ids = random_ids(9)
    assert teacher.score_one(ids, start=0).start == 1


@pytest.mark.parametrize(
    ("dtype", "nearest"), [(Tensor.DATA_TYPE_UNSPECIFIED, 0.01), (Tensor.DATA_TYPE_FALLING, 0.05)]
)
def test_half_precision_and_packed_ids_round_only(
    teacher: Teacher, dtype: Tensor.DataType.ValueType, nearest: float
) -> None:
    ids = random_ids(65)
    exact = teacher.score_one(ids, top_k=64)
    rounded = teacher.score_one(ids, top_k=64, logprob_dtype=dtype, pack_token_ids=True)
    assert np.abs(exact.logprobs - rounded.logprobs).max() < nearest
    assert np.array_equal(np.sort(exact.token_ids), np.sort(rounded.token_ids))
    assert np.allclose(exact.log_tail, rounded.log_tail, atol=2e-3)
    assert teacher_pb2.CAPABILITY_COMPACT_LOGPROBS in teacher.info.capabilities
    if dtype == Tensor.DATA_TYPE_FALLING:  # the rows of every engine fall, so that they travel as such
        requests = [
            teacher_pb2.ScoreRequest(config=distribution_config(64, logprob_dtype=dtype)),
            teacher_pb2.ScoreRequest(sequence=sequence(ids)),
        ]
        (response,) = teacher.stub.Score(iter(requests))
        assert response.results[0].distributions.logprobs.dtype == dtype


def test_each_bad_sequence_gets_its_own_error_and_the_others_are_scored(
    teacher: Teacher, models: Models
) -> None:
    size, good = teacher.info.tokenizer_size, random_ids(12)
    bad = {
        Reason.EMPTY_SEQUENCE: [sequence([]), sequence([5])],
        Reason.SEQUENCE_TOO_LONG: [sequence(random_ids(513))],
        Reason.TOKEN_OUT_OF_RANGE: [sequence([1, size, 2]), sequence([1, -1]), sequence([2**31 - 1, 1])],
        Reason.ADAPTER_NOT_FOUND: [sequence(good, adapter="nobody")],
        Reason.INVALID_REQUEST: [
            sequence(good, start=12),
            sequence(good, start=-1),
            sequence(good, timeout_ms=-1),
        ],
        Reason.TENSOR_INVALID: [
            teacher_pb2.ScoreSequence(token_ids=encode(good.reshape(3, 4))),
            teacher_pb2.ScoreSequence(token_ids=encode(good.astype(np.float32))),
            teacher_pb2.ScoreSequence(
                token_ids=Tensor(dtype=Tensor.DATA_TYPE_INT32, shape=[400], data=b"\0")
            ),
        ],
    }
    wanted: list[Reason | None] = []
    sequences = []
    for reason, several in bad.items():
        for each in several:
            sequences += [each, sequence(good)]
            wanted += [reason, None]
    answers = teacher.score(sequences)
    assert len(answers) == len(sequences)
    whole = reference_logprobs(models.teacher, good)
    for index, expected in enumerate(wanted):
        answer = answers[index]
        if expected is None:
            assert not isinstance(answer, StillhouseError)
            assert_agrees(answer, good, whole, top_k=20)
        else:
            assert isinstance(answer, StillhouseError)
            assert answer.reason == expected


def test_errors_name_value_index_and_limit(teacher: Teacher) -> None:
    size = teacher.info.tokenizer_size
    answers = teacher.score([sequence([1, 2, size]), sequence(random_ids(600))])
    assert isinstance(answers[0], StillhouseError)
    assert isinstance(answers[1], StillhouseError)
    assert "token_ids[2]" in answers[0].message
    assert str(size) in answers[0].message
    assert "600" in answers[1].message
    assert "512" in answers[1].message


def test_the_first_message_and_only_the_first_is_the_config(teacher: Teacher) -> None:
    config = teacher_pb2.ScoreRequest(config=distribution_config())
    scored = teacher_pb2.ScoreRequest(sequence=sequence([1, 2, 3]))
    for requests in ([scored], [config, config], [config, teacher_pb2.ScoreRequest()], []):
        with pytest.raises(StillhouseError) as caught:
            teacher.score_stream(iter(requests))
        assert caught.value.reason == Reason.INVALID_REQUEST


def test_a_top_k_above_the_limit_is_refused_by_name(teacher: Teacher) -> None:
    with pytest.raises(StillhouseError, match=r"top_k is 257.*256") as caught:
        teacher.score([sequence([1, 2])], top_k=257)
    assert caught.value.reason == Reason.TOP_K_TOO_LARGE


def test_a_slow_sequence_times_out_alone(teacher: Teacher) -> None:
    long = random_ids(512)
    crowd = {number: sequence(long) for number in range(24)}
    crowd[99] = sequence(long, timeout_ms=1)
    answers = teacher.score(crowd, top_k=256)
    slow = answers.pop(99)
    assert isinstance(slow, StillhouseError)
    assert slow.reason == Reason.ITEM_TIMEOUT
    assert not any(isinstance(answer, StillhouseError) for answer in answers.values())


def test_a_long_response_comes_in_parts_of_at_most_1_mib(teacher: Teacher) -> None:
    ids = random_ids(512)
    parts = 0
    requests = [
        teacher_pb2.ScoreRequest(config=distribution_config(256)),
        teacher_pb2.ScoreRequest(sequence=sequence(ids)),
    ]
    rows = []
    for response in teacher.stub.Score(iter(requests)):
        assert response.ByteSize() <= 1 << 20
        for result in response.results:
            parts += 1
            rows.append((result.distributions.start, result.distributions.target_logprobs.shape[0]))
    assert parts > 1
    assert all(start + count == after for (start, count), (after, _) in itertools.pairwise(rows))
    assert sum(count for _, count in rows) == 511


def test_concurrent_streams_get_their_own_responses(teacher: Teacher, models: Models) -> None:
    def one(seed: int) -> None:
        sequences = [random_ids(8 + seed + length, seed) for length in range(6)]
        answers = teacher.score([sequence(ids) for ids in sequences])
        for index, ids in enumerate(sequences):
            answer = answers[index]
            assert not isinstance(answer, StillhouseError)
            assert_agrees(answer, ids, references[seed][index], top_k=20)

    references = {
        seed: [reference_logprobs(models.teacher, random_ids(8 + seed + length, seed)) for length in range(6)]
        for seed in range(4)
    }
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))


def test_more_sequences_than_may_be_in_flight_are_all_scored(teacher: Teacher) -> None:
    count = 3 * teacher.info.max_inflight_sequences
    answers = teacher.score([sequence(random_ids(2 + number % 5)) for number in range(count)], top_k=1)
    assert sorted(answers) == list(range(count))


def test_optional_parts_are_right_or_refused_by_name(teacher: Teacher, models: Models) -> None:
    ids = random_ids(21)
    wanted = reference_logprobs(models.teacher, ids)[:-1]
    asked: dict[int, dict[str, Any]] = {
        teacher_pb2.CAPABILITY_LOG_PARTITIONS: {"temperatures": [0.5, 2.0]},
        teacher_pb2.CAPABILITY_SAMPLED_TOKENS: {"num_sampled_tokens": 8},
        teacher_pb2.CAPABILITY_TAIL_SAMPLES: {
            "num_sampled_tokens": 8,
            "sample_tail": True,
            "sample_temperature": 2.0,
            "sampled_logprobs": True,
        },
        teacher_pb2.CAPABILITY_STRATIFIED_SAMPLES: {
            "num_sampled_tokens": 8,
            "sample_tail": True,
            "sampled_logprobs": True,
            "stratified_samples": True,
        },
        teacher_pb2.CAPABILITY_ENTROPY: {"entropy": True},
        teacher_pb2.CAPABILITY_HIDDEN_STATES: {"hidden_states": True},
        teacher_pb2.CAPABILITY_LAYER_STATES: {"hidden_layers": [0, 2]},
    }
    for capability, fields in asked.items():
        if capability not in teacher.info.capabilities:
            with pytest.raises(StillhouseError, match="--engine hf") as caught:
                teacher.score_one(ids, **fields)
            assert caught.value.reason == Reason.CAPABILITY
            continue
        answer = teacher.score_one(ids, **fields)
        if answer.log_partitions is not None:
            partitions = [np.log(np.exp(wanted / each).sum(axis=1)) for each in (0.5, 2.0)]
            assert np.abs(answer.log_partitions - np.stack(partitions, axis=1)).max() < 1e-4
        if answer.entropy is not None:
            assert np.abs(answer.entropy + (np.exp(wanted) * wanted).sum(axis=1)).max() < 1e-4
        if answer.sampled_token_ids is not None:
            assert answer.sampled_token_ids.shape == (20, 8)
            if "stratified_samples" in fields:
                assert (np.diff(answer.sampled_token_ids, axis=1) >= 0).all()
        if answer.sampled_logprobs is not None:
            assert answer.sampled_token_ids is not None
            drawn = np.take_along_axis(wanted, answer.sampled_token_ids.astype(np.int64), axis=1)
            assert np.abs(answer.sampled_logprobs - drawn).max() < 1e-4
        if answer.hidden_states is not None:
            assert (teacher.info.num_layers, teacher.info.hidden_size) == (2, 64)
            assert answer.hidden_states.shape == (20, 64)
            last = answer.hidden_states
        if answer.layer_states is not None:
            assert answer.layer_states.shape == (20, 2, 64)
            np.testing.assert_array_equal(answer.layer_states[:, 1], last)


def test_query_logprobs_are_right_or_refused_by_name(teacher: Teacher, models: Models) -> None:
    ids = random_ids(11)
    query = np.random.default_rng(3).integers(-1, 384, (6, 5))
    answer = teacher.score([sequence(ids, start=5, query=query)])[0]
    if teacher_pb2.CAPABILITY_QUERY_LOGPROBS not in teacher.info.capabilities:
        assert isinstance(answer, StillhouseError)
        assert answer.reason == Reason.CAPABILITY
        return
    assert not isinstance(answer, StillhouseError)
    assert answer.query_logprobs is not None
    wanted = np.take_along_axis(reference_logprobs(models.teacher, ids)[4:-1], query.clip(0), axis=1)
    assert np.array_equal(np.isneginf(answer.query_logprobs), query < 0)
    assert np.abs(np.where(query < 0, 0, answer.query_logprobs - wanted)).max() < 1e-4


@pytest.mark.parametrize("prompt_length", [31, 32, 33, 64])
def test_prompts_that_end_at_a_cache_block_keep_their_first_row(
    teacher: Teacher, models: Models, prompt_length: int
) -> None:
    start = random_ids(prompt_length, seed=77)
    whole = [np.concatenate([start, random_ids(3 + number, seed=number)]) for number in range(2)]
    for _ in range(2):  # the second time from the prefix cache, if there is one
        answers = teacher.score([sequence(ids, start=prompt_length) for ids in whole], top_k=8)
        for index, ids in enumerate(whole):
            answer = answers[index]
            assert not isinstance(answer, StillhouseError)
            assert_agrees(answer, ids, reference_logprobs(models.teacher, ids), top_k=8)


def test_a_teacher_with_a_prefix_cache_tells_what_it_held(teacher: Teacher) -> None:
    whole = random_ids(130, seed=4711)
    parts = [sequence(whole[:66], start=2), sequence(whole, start=66)]
    reused = []
    for part in parts:
        teacher.score([part])
        reused.append(teacher.reused.get(0))
    if teacher_pb2.CAPABILITY_PREFIX_REUSE in teacher.info.capabilities:
        assert reused == [0, 64]
    else:
        assert set(reused) <= {None, 0}


def test_the_second_runner_has_every_capability(second_runner_teacher: Program) -> None:
    teacher = Teacher(second_runner_teacher.target)
    assert teacher.info.engine.endswith("(tier worker)")
    assert WorkerTier.capabilities | {teacher_pb2.CAPABILITY_HOT_ADAPTERS} <= set(teacher.info.capabilities)
    teacher.close()
    assert "tier not used" not in second_runner_teacher.log()
    assert "prefix cache not used" not in second_runner_teacher.log()


def test_cancelled_calls_leave_the_teacher_free(teacher: Teacher) -> None:
    request = teacher_pb2.GenerateRequest(
        prompts=[prompt(random_ids(4, seed=number)) for number in range(64)],
        num_samples=8,
        sampling=teacher_pb2.SamplingParams(max_new_tokens=500),
    )
    writing = teacher.stub.Generate(request)
    next(iter(writing))
    writing.cancel()
    never_ends = threading.Event()

    def endless() -> Iterator[teacher_pb2.ScoreRequest]:
        yield teacher_pb2.ScoreRequest(config=distribution_config())
        for number in range(200):
            one = sequence(random_ids(512, seed=number))
            one.sequence_id = number
            yield teacher_pb2.ScoreRequest(sequence=one)
        never_ends.wait()

    scoring = teacher.stub.Score(endless())
    next(iter(scoring))
    scoring.cancel()
    never_ends.set()
    begin = time.monotonic()
    teacher.score_one(random_ids(8))
    assert time.monotonic() - begin < 20


def test_the_teacher_describes_itself_completely(teacher: Teacher, models: Models) -> None:
    info = teacher.info
    assert info.model == str(models.teacher)
    assert (info.tokenizer_size, info.vocab_size) == (384, 392)
    assert (info.max_sequence_tokens, info.max_top_k, info.max_prompts) == (512, 256, 1024)
    assert info.dtype == "float32"
    assert list(info.eos_token_ids) == [0]
    for each in (info.model_fingerprint, info.tokenizer_fingerprint, info.chat_template_fingerprint):
        assert len(bytes.fromhex(each)) == 32
    assert teacher_pb2.CAPABILITY_HOT_ADAPTERS in info.capabilities


def test_the_streamed_tokenizer_has_the_described_fingerprint(teacher: Teacher, models: Models) -> None:
    from transformers import AutoTokenizer

    files: dict[str, bytes] = {}
    name = ""
    for chunk in teacher.stub.GetTokenizer(teacher_pb2.GetTokenizerRequest()):
        name = chunk.file_name or name
        files[name] = files.get(name, b"") + chunk.data
    special = AutoTokenizer.from_pretrained(models.teacher).special_tokens_map
    assert tokenizer_fingerprint(files["tokenizer.json"], special) == teacher.info.tokenizer_fingerprint
