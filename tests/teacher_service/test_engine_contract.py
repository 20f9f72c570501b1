"""What every engine keeps, over gRPC, against a float32 forward of transformers: one suite for hf and vllm."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos.errors import Reason, StillhouseError, from_rpc_error
from protos.stillhouse.v1 import teacher_pb2
from protos.stillhouse.v1.tensor_pb2 import Tensor
from protos.tensor_codec import encode
from protos.tokenizer_fingerprint import tokenizer_fingerprint
from tests.conftest import Models
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

STOP = teacher_pb2.SampleChunk.FINISH_REASON_STOP
LENGTH = teacher_pb2.SampleChunk.FINISH_REASON_LENGTH


@pytest.fixture(scope="session", params=["hf_teacher", "vllm_teacher"])
def teacher(request: pytest.FixtureRequest) -> Iterator[Teacher]:
    client = Teacher(request.getfixturevalue(request.param).target)
    yield client
    client.close()


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


def test_half_precision_and_packed_ids_round_only(teacher: Teacher) -> None:
    ids = random_ids(65)
    exact = teacher.score_one(ids, top_k=64)
    rounded = teacher.score_one(
        ids, top_k=64, logprob_dtype=Tensor.DATA_TYPE_UNSPECIFIED, pack_token_ids=True
    )
    assert np.abs(exact.logprobs - rounded.logprobs).max() < 0.01
    assert np.array_equal(np.sort(exact.token_ids), np.sort(rounded.token_ids))
    assert np.allclose(exact.log_tail, rounded.log_tail, atol=1e-4)


def test_each_bad_sequence_gets_its_own_error_and_the_others_their_answers(
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


def test_unanswered_ids_are_unique(teacher: Teacher) -> None:
    long = random_ids(512)
    requests = [teacher_pb2.ScoreRequest(config=distribution_config())]
    for _ in range(2):
        one = sequence(long)
        one.sequence_id = 7
        requests.append(teacher_pb2.ScoreRequest(sequence=one))
    results = [
        result
        for response in teacher.stub.Score(iter(requests))
        for result in response.results
        if result.last
    ]
    assert [result.sequence_id for result in results] == [7, 7]
    assert sum(result.HasField("error") for result in results) == 1


def test_a_slow_answer_times_out_alone(teacher: Teacher) -> None:
    long = random_ids(512)
    crowd = {number: sequence(long) for number in range(24)}
    crowd[99] = sequence(long, timeout_ms=1)
    answers = teacher.score(crowd, top_k=256)
    slow = answers.pop(99)
    assert isinstance(slow, StillhouseError)
    assert slow.reason == Reason.ITEM_TIMEOUT
    assert not any(isinstance(answer, StillhouseError) for answer in answers.values())


def test_a_long_answer_comes_in_parts_of_at_most_1_mib(teacher: Teacher) -> None:
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


def test_many_streams_at_once_get_their_own_answers(teacher: Teacher, models: Models) -> None:
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


def test_more_sequences_than_may_be_in_flight_all_get_answers(teacher: Teacher) -> None:
    count = 3 * teacher.info.max_inflight_sequences
    answers = teacher.score([sequence(random_ids(2 + number % 5)) for number in range(count)], top_k=1)
    assert sorted(answers) == list(range(count))


def test_optional_parts_are_right_or_refused_by_name(teacher: Teacher, models: Models) -> None:
    ids = random_ids(21)
    wanted = reference_logprobs(models.teacher, ids)[:-1]
    asked: dict[int, dict[str, Any]] = {
        teacher_pb2.CAPABILITY_LOG_PARTITIONS: {"temperatures": [0.5, 2.0]},
        teacher_pb2.CAPABILITY_SAMPLED_TOKENS: {"num_sampled_tokens": 8},
        teacher_pb2.CAPABILITY_ENTROPY: {"entropy": True},
        teacher_pb2.CAPABILITY_HIDDEN_STATES: {"hidden_states": True},
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
        if answer.hidden_states is not None:
            assert answer.hidden_states.shape == (20, 64)


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


def test_generation_reports_what_scoring_the_text_says(teacher: Teacher, models: Models) -> None:
    start = random_ids(7)
    samples = teacher.generate(
        [prompt(start)], num_samples=3, config=distribution_config(64), seed=5, max_new_tokens=24
    )
    assert sorted(samples) == [(0, 0), (0, 1), (0, 2)]
    for sample in samples.values():
        assert sample.prompt_tokens == 7
        assert 0 < len(sample.ids) <= 24
        whole = np.concatenate([start, np.array(sample.ids, np.int32)])
        assert sample.distributions.start == 7
        assert_agrees(sample.distributions, whole, reference_logprobs(models.teacher, whole), top_k=64)
        scored = teacher.score_one(whole, start=7, top_k=64)
        assert np.abs(scored.logprobs - sample.distributions.logprobs).max() < 1e-4


def test_sampling_logprobs_are_of_the_distribution_drawn_from(teacher: Teacher, models: Models) -> None:
    start, size = random_ids(7), teacher.info.tokenizer_size
    sample = teacher.generate([prompt(start)], seed=5, max_new_tokens=16, temperature=0.7, top_k=5)[0, 0]
    whole = np.concatenate([start, np.array(sample.ids, np.int32)])
    tempered = reference_logprobs(models.teacher, whole)[6:-1, :size] / 0.7
    kept = -np.sort(-tempered, axis=1)[:, :5]
    normaliser = np.log(np.exp(kept - kept[:, :1]).sum(axis=1)) + kept[:, 0]
    wanted = np.take_along_axis(tempered, np.array(sample.ids)[:, None], axis=1)[:, 0] - normaliser
    assert np.abs(wanted - sample.sampling_logprobs).max() < 1e-3


def test_greedy_writes_the_likeliest_tokens(teacher: Teacher) -> None:
    start, size = random_ids(5, seed=2), teacher.info.tokenizer_size
    sample = teacher.generate(
        [prompt(start)], temperature=0, max_new_tokens=8, config=distribution_config(20)
    )[0, 0]
    assert all(logprob == 0 for logprob in sample.sampling_logprobs)
    likeliest = [next(token for token in row if token < size) for row in sample.distributions.token_ids]
    assert likeliest == sample.ids


def test_a_seed_fixes_each_sample_in_any_batch(teacher: Teacher) -> None:
    start, other = random_ids(9, seed=4), random_ids(30, seed=5)
    alone = teacher.generate([prompt(start)], num_samples=2, seed=11, max_new_tokens=12)
    crowd = teacher.generate(
        [prompt(other), prompt(start), prompt(other[:4])], num_samples=3, seed=11, max_new_tokens=12
    )
    assert alone[0, 0].ids == crowd[1, 0].ids
    assert alone[0, 1].ids == crowd[1, 1].ids
    assert alone[0, 0].ids != alone[0, 1].ids
    again = teacher.generate([prompt(start)], num_samples=1, seed=12, max_new_tokens=12)
    assert again[0, 0].ids != alone[0, 0].ids


def test_single_samples_of_a_prompt_are_those_of_a_call_for_all(teacher: Teacher) -> None:
    start = random_ids(9, seed=4)
    every = teacher.generate([prompt(start)], num_samples=4, seed=11, max_new_tokens=12)
    some = teacher.generate(
        [prompt(start[:5]), prompt(start, sample_indices=[3, 1])], seed=11, max_new_tokens=12
    )
    assert sorted(some) == [(0, 0), (1, 1), (1, 3)]
    assert [some[1, index].ids for index in (1, 3)] == [every[0, index].ids for index in (1, 3)]


@pytest.mark.parametrize("indices", [[0, 0], [-1], [4096]])
def test_samples_that_cannot_be_are_refused(teacher: Teacher, indices: list[int]) -> None:
    with pytest.raises(StillhouseError, match="sample_indices has") as caught:
        teacher.generate([prompt([5], sample_indices=indices)])
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_whole_samples_are_those_that_would_have_been_streamed(teacher: Teacher) -> None:
    stop = teacher_pb2.SamplingParams(stop=["e", "a"])
    prompts = [prompt(random_ids(9, seed=4)), prompt(random_ids(30, seed=5), sampling=stop)]
    options = {"num_samples": 2, "seed": 11, "max_new_tokens": 40, "config": distribution_config(4)}
    streamed = teacher.generate(prompts, **options)
    whole = teacher.generate(prompts, **options, whole_samples=True, prompt_token_ids=True)
    for key, sample in whole.items():
        assert (sample.ids, sample.text, sample.finish) == (
            streamed[key].ids,
            streamed[key].text,
            streamed[key].finish,
        )
        assert sample.num_chunks == 1
        assert sample.prompt_ids == random_ids([9, 30][key[0]], seed=[4, 5][key[0]]).tolist()
        assert sample.distributions.start == [9, 30][key[0]]
        assert sample.distributions.num_rows == len(sample.ids)
        assert streamed[key].prompt_ids == []


def test_a_prompts_own_sampling_overrides_the_calls(teacher: Teacher) -> None:
    start = random_ids(9, seed=4)
    own = teacher_pb2.SamplingParams(max_new_tokens=3)
    samples = teacher.generate([prompt(start), prompt(start, sampling=own)], seed=11, max_new_tokens=9)
    assert len(samples[1, 0].ids) == 3
    assert samples[0, 0].ids[:3] == samples[1, 0].ids


def test_a_stop_string_ends_a_sample_and_is_not_part_of_it(teacher: Teacher) -> None:
    start = random_ids(9, seed=6)
    free = teacher.generate([prompt(start)], seed=3, max_new_tokens=40)[0, 0]
    begin = next(index for index in range(6, len(free.text) - 3) if free.text[index : index + 3].isascii())
    stop = free.text[begin : begin + 3]
    ended = teacher.generate([prompt(start)], seed=3, max_new_tokens=40, stop=["@@never@@", stop])[0, 0]
    assert ended.finish == STOP
    assert ended.text == free.text[: free.text.index(stop)]
    assert ended.ids == free.ids[: len(ended.ids)]
    assert len(ended.ids) < len(free.ids)


def test_text_and_conversations_go_through_the_models_tokenizer_and_template(
    teacher: Teacher, models: Models
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.teacher)
    messages = [{"role": "user", "content": models.texts[0]}]
    text_ids = tokenizer.encode(models.texts[0])
    chat_ids = tokenizer.encode(
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    )
    conversation = teacher_pb2.Conversation(messages=[teacher_pb2.Message(**messages[0])])
    samples = teacher.generate(
        [
            teacher_pb2.Prompt(text=models.texts[0]),
            prompt(text_ids),
            teacher_pb2.Prompt(conversation=conversation),
            prompt(chat_ids),
        ],
        seed=1,
        max_new_tokens=8,
    )
    assert samples[0, 0].ids == samples[1, 0].ids
    assert samples[2, 0].ids == samples[3, 0].ids
    assert samples[0, 0].prompt_tokens == len(text_ids)
    assert samples[2, 0].prompt_tokens == len(chat_ids)
    for sample in samples.values():
        assert sample.text == tokenizer.decode(sample.ids, skip_special_tokens=True)


def test_each_bad_prompt_gets_its_own_error(teacher: Teacher) -> None:
    prompts = [
        prompt(random_ids(4)),
        prompt([]),
        prompt(random_ids(512)),
        prompt([1, teacher.info.tokenizer_size]),
        teacher_pb2.Prompt(),
        prompt(random_ids(4), adapter="nobody"),
        prompt(random_ids(4), sampling=teacher_pb2.SamplingParams(top_p=1.5)),
    ]
    samples = teacher.generate(prompts, num_samples=2, max_new_tokens=4)
    reasons = {key: sample.error.reason if sample.error else None for key, sample in samples.items()}
    wanted = [
        None,
        Reason.EMPTY_SEQUENCE,
        Reason.SEQUENCE_TOO_LONG,
        Reason.TOKEN_OUT_OF_RANGE,
        Reason.INVALID_REQUEST,
        Reason.ADAPTER_NOT_FOUND,
        Reason.INVALID_REQUEST,
    ]
    assert reasons == {(index, sample): reason for index, reason in enumerate(wanted) for sample in (0, 1)}


def test_a_sample_ends_at_the_models_length(teacher: Teacher) -> None:
    sample = teacher.generate([prompt(random_ids(509))], max_new_tokens=100, temperature=0)[0, 0]
    assert len(sample.ids) <= 3
    assert sample.finish == (LENGTH if len(sample.ids) == 3 else STOP)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"stop": [""]},
    ],
)
def test_impossible_sampling_is_refused_before_anything_is_written(
    teacher: Teacher, fields: dict[str, Any]
) -> None:
    with pytest.raises(StillhouseError) as caught:
        teacher.generate([prompt([1, 2])], **fields)
    assert caught.value.reason == Reason.INVALID_REQUEST


def test_a_call_has_prompts_and_not_too_many(teacher: Teacher) -> None:
    for prompts in ([], [prompt([1])] * (teacher.info.max_prompts + 1)):
        with pytest.raises(StillhouseError, match="prompts") as caught:
            teacher.generate(prompts)
        assert caught.value.reason == Reason.INVALID_REQUEST


def test_adapters_speak_as_peft_says_also_in_mixed_batches(teacher: Teacher, models: Models) -> None:
    stub, ids = teacher.stub, random_ids(24, seed=8)
    names = {"mix-a/1": models.adapter_a, "mix-b/1.5": models.adapter_b}
    try:
        for name, path in names.items():
            loaded = stub.LoadAdapter(teacher_pb2.LoadAdapterRequest(adapter=name, path=str(path)))
            again = stub.LoadAdapter(teacher_pb2.LoadAdapterRequest(adapter=name, path=str(path)))
            assert loaded == again
        references = {"": reference_logprobs(models.teacher, ids)}
        references |= {name: reference_logprobs(models.teacher, ids, path) for name, path in names.items()}
        order = ["", "mix-a/1", "", "mix-b/1.5", "mix-a/1", "", "mix-b/1.5", ""]
        answers = teacher.score([sequence(ids, adapter=name) for name in order])
        for index, name in enumerate(order):
            answer = answers[index]
            assert not isinstance(answer, StillhouseError)
            assert_agrees(answer, ids, references[name], top_k=20)
        samples = teacher.generate(
            [prompt(ids, adapter="mix-a/1"), prompt(ids)],
            config=distribution_config(),
            seed=1,
            max_new_tokens=8,
        )
        whole = np.concatenate([ids, np.array(samples[0, 0].ids, np.int32)])
        spoken = reference_logprobs(models.teacher, whole, models.adapter_a)
        assert_agrees(samples[0, 0].distributions, whole, spoken, top_k=20)
        info = stub.GetTeacherInfo(teacher_pb2.GetTeacherInfoRequest())
        prints = {adapter.name: adapter.fingerprint for adapter in info.adapters}
        assert set(prints) == set(names)
        assert samples[0, 0].adapter_fingerprint == prints["mix-a/1"]
        assert samples[1, 0].adapter_fingerprint == ""
    finally:
        for name in names:
            stub.UnloadAdapter(teacher_pb2.UnloadAdapterRequest(adapter=name))
    base = teacher.score_one(ids)
    assert_agrees(base, ids, references[""], top_k=20)


def test_a_name_never_changes_its_weights(teacher: Teacher, models: Models) -> None:
    def load(path: Path) -> teacher_pb2.LoadAdapterResponse:
        return teacher.stub.LoadAdapter(teacher_pb2.LoadAdapterRequest(adapter="fixed/1", path=str(path)))

    load(models.adapter_a)
    for _ in range(2):  # while it is loaded, and after it is not
        assert refusal(teacher, lambda: load(models.adapter_b)).reason == Reason.ADAPTER_CONFLICT
        if any(
            each.name == "fixed/1"
            for each in teacher.stub.GetTeacherInfo(teacher_pb2.GetTeacherInfoRequest()).adapters
        ):
            teacher.stub.UnloadAdapter(teacher_pb2.UnloadAdapterRequest(adapter="fixed/1"))
    load(models.adapter_a)
    teacher.stub.UnloadAdapter(teacher_pb2.UnloadAdapterRequest(adapter="fixed/1"))
    answer = teacher.score([sequence([1, 2, 3], adapter="fixed/1")])[0]
    assert isinstance(answer, StillhouseError)
    assert answer.reason == Reason.ADAPTER_NOT_FOUND


def test_what_is_no_adapter_is_refused_and_the_teacher_goes_on(
    teacher: Teacher, models: Models, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{}")
    (broken / "adapter_model.safetensors").write_bytes(b"no weights")
    misfit = tmp_path / "misfit"
    misfit.mkdir()
    config = json.loads((models.adapter_a / "adapter_config.json").read_text())
    (misfit / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))
    (misfit / "adapter_model.safetensors").write_bytes(
        (models.adapter_a / "adapter_model.safetensors").read_bytes()
    )
    wanted = [
        ("x", str(tmp_path), Reason.ADAPTER_INVALID),
        ("x", str(tmp_path / "nowhere"), Reason.ADAPTER_INVALID),
        ("x", str(broken), Reason.ADAPTER_INVALID),
        ("x", str(misfit), Reason.ADAPTER_INVALID),
        ("x", "a\0b", Reason.ADAPTER_INVALID),
        ("../x", str(models.adapter_a), Reason.INVALID_REQUEST),
        ("", str(models.adapter_a), Reason.INVALID_REQUEST),
        ("a b", str(models.adapter_a), Reason.INVALID_REQUEST),
        ("x" * 200, str(models.adapter_a), Reason.INVALID_REQUEST),
    ]
    for name, path, reason in wanted:
        request = teacher_pb2.LoadAdapterRequest(adapter=name, path=path)
        error = refusal(teacher, partial(teacher.stub.LoadAdapter, request))
        assert error.reason == reason, (name, path, error.message)
    ids = random_ids(12)
    assert_agrees(teacher.score_one(ids), ids, reference_logprobs(models.teacher, ids), top_k=20)


def test_unknown_adapters_cannot_be_unloaded_and_empty_uploads_are_refused(teacher: Teacher) -> None:
    unknown = refusal(
        teacher, lambda: teacher.stub.UnloadAdapter(teacher_pb2.UnloadAdapterRequest(adapter="nobody"))
    )
    assert unknown.reason == Reason.ADAPTER_NOT_FOUND
    upload = refusal(teacher, lambda: teacher.stub.UploadAdapter(iter([teacher_pb2.UploadAdapterRequest()])))
    assert upload.reason == Reason.ADAPTER_INVALID


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
    assert time.monotonic() - begin < 5


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


def test_the_tokenizer_that_is_sent_is_the_one_that_is_described(teacher: Teacher, models: Models) -> None:
    from transformers import AutoTokenizer

    files: dict[str, bytes] = {}
    name = ""
    for piece in teacher.stub.GetTokenizer(teacher_pb2.GetTokenizerRequest()):
        name = piece.file_name or name
        files[name] = files.get(name, b"") + piece.data
    special = AutoTokenizer.from_pretrained(models.teacher).special_tokens_map
    assert tokenizer_fingerprint(files["tokenizer.json"], special) == teacher.info.tokenizer_fingerprint


def refusal(teacher: Teacher, call: Callable[[], object]) -> StillhouseError:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return from_rpc_error(caught.value, target=teacher.target, service="teacher")
