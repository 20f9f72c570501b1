"""Conformance of engines in generation, over gRPC: one suite for hf and vllm."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.conversation import parse_turns
from stillhouse.protos.rows.wire import to_wire
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from tests.conftest import Models
from tests.teacher_service.calls import (
    Teacher,
    assert_agrees,
    distribution_config,
    prompt,
    random_ids,
    reference_logprobs,
)

STOP = teacher_pb2.SampleChunk.FINISH_REASON_STOP
LENGTH = teacher_pb2.SampleChunk.FINISH_REASON_LENGTH


def test_generation_reports_the_distributions_of_scoring_the_completion(
    teacher: Teacher, models: Models
) -> None:
    start = random_ids(7)
    has_all = teacher_pb2.CAPABILITY_SAMPLED_TOKENS in teacher.info.capabilities
    more: dict[str, Any] = {"temperatures": [0.5], "entropy": True, "num_sampled_tokens": 4}
    config = distribution_config(64, **(more if has_all else {}))
    samples = teacher.generate([prompt(start)], num_samples=3, config=config, seed=5, max_new_tokens=24)
    assert sorted(samples) == [(0, 0), (0, 1), (0, 2)]
    for sample in samples.values():
        assert sample.prompt_tokens == 7
        assert 0 < len(sample.ids) <= 24
        whole = np.concatenate([start, np.array(sample.ids, np.int32)])
        assert sample.distributions.start == 7
        assert_agrees(sample.distributions, whole, reference_logprobs(models.teacher, whole), top_k=64)
        scored = teacher.score_one(whole, start=7, top_k=64, **(more if has_all else {}))
        assert np.abs(scored.logprobs - sample.distributions.logprobs).max() < 1e-4
        for name in ("log_partitions", "entropy") if has_all else ():
            np.testing.assert_allclose(
                getattr(scored, name), getattr(sample.distributions, name), atol=1e-4, err_msg=name
            )
        if has_all:
            wanted, drawn = scored.sampled_token_ids, sample.distributions.sampled_token_ids
            assert wanted is not None
            assert drawn is not None
            assert np.array_equal(wanted, drawn)


def test_sampling_logprobs_are_of_the_sampled_distribution(teacher: Teacher, models: Models) -> None:
    start, size = random_ids(7), teacher.info.tokenizer_size
    sample = teacher.generate([prompt(start)], seed=5, max_new_tokens=16, temperature=0.7, top_k=5)[0, 0]
    whole = np.concatenate([start, np.array(sample.ids, np.int32)])
    tempered = reference_logprobs(models.teacher, whole)[6:-1, :size] / 0.7
    kept = -np.sort(-tempered, axis=1)[:, :5]
    normaliser = np.log(np.exp(kept - kept[:, :1]).sum(axis=1)) + kept[:, 0]
    wanted = np.take_along_axis(tempered, np.array(sample.ids)[:, None], axis=1)[:, 0] - normaliser
    assert np.abs(wanted - sample.sampling_logprobs).max() < 1e-3


def test_greedy_generation_takes_the_argmax(teacher: Teacher) -> None:
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
def test_invalid_sample_indices_are_refused(teacher: Teacher, indices: list[int]) -> None:
    with pytest.raises(StillhouseError, match="sample_indices has") as caught:
        teacher.generate([prompt([5], sample_indices=indices)])
    assert caught.value.reason is Reason.INVALID_REQUEST


def test_unstreamed_samples_equal_streamed_ones(teacher: Teacher) -> None:
    stop = teacher_pb2.SamplingParams(stop=["e", "a"])
    prompts = [prompt(random_ids(9, seed=4)), prompt(random_ids(30, seed=5), sampling=stop)]
    options: dict[str, Any] = {
        "num_samples": 2,
        "seed": 11,
        "max_new_tokens": 40,
        "config": distribution_config(4),
    }
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
        assert sum(each.num_rows for each in sample.rows) == len(sample.ids)
        if sample.ids:  # a stop string may end it before its first token
            assert sample.distributions.start == [9, 30][key[0]]
        assert streamed[key].prompt_ids == []


def test_samples_in_parts_equal_whole_ones(teacher: Teacher) -> None:
    stop = teacher_pb2.SamplingParams(stop=["e", "a"])
    prompts = [prompt(random_ids(9, seed=4)), prompt(random_ids(30, seed=5), sampling=stop)]
    options: dict[str, Any] = {"seed": 11, "max_new_tokens": 50, "config": distribution_config(4)}
    whole = teacher.generate(prompts, **options, whole_samples=True)
    parts = teacher.generate(prompts, **options, whole_samples=True, part_tokens=16)
    for key, sample in parts.items():
        assert (sample.ids, sample.text, sample.finish) == (
            whole[key].ids,
            whole[key].text,
            whole[key].finish,
        )
        if sample.ids:
            assert sample.distributions.start == whole[key].distributions.start
            np.testing.assert_array_equal(sample.distributions.token_ids, whole[key].distributions.token_ids)
    long = parts[0, 0]
    assert len(long.ids) == 50
    assert 3 <= long.num_chunks <= 4
    assert all(16 <= each.num_rows < 32 for each in long.rows[:-1])


def test_a_negative_size_of_parts_is_refused(teacher: Teacher) -> None:
    with pytest.raises(StillhouseError, match="part_tokens is -1") as caught:
        teacher.generate([prompt([5])], whole_samples=True, part_tokens=-1)
    assert caught.value.reason is Reason.INVALID_REQUEST


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
    conversation = to_wire(parse_turns(messages))
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
        teacher_pb2.Prompt(conversation=to_wire(parse_turns([{"role": "user", "content": "a"}]))),
    ]
    prompts[-1].conversation.date = "26 Jul 2024"
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
def test_invalid_sampling_is_refused_before_generation(teacher: Teacher, fields: dict[str, Any]) -> None:
    with pytest.raises(StillhouseError) as caught:
        teacher.generate([prompt([1, 2])], **fields)
    assert caught.value.reason == Reason.INVALID_REQUEST


def test_a_call_has_prompts_and_not_too_many(teacher: Teacher) -> None:
    for prompts in ([], [prompt([1])] * (teacher.info.max_prompts + 1)):
        with pytest.raises(StillhouseError, match="prompts") as caught:
            teacher.generate(prompts)
        assert caught.value.reason == Reason.INVALID_REQUEST
