"""Joined and mixed supports against dense distributions, the vocabulary handshake, and rollouts that are too old."""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.protos.tokenizers.fingerprint import tokenizer_fingerprint
from stillhouse.student_trainer.config.proto import from_proto
from stillhouse.student_trainer.config.schema import RolloutConfig, StudentContextConfig
from stillhouse.student_trainer.train.batching.supports import TAIL_FLOOR, mix, with_query
from stillhouse.student_trainer.train.batching.target_forms import target_rows
from stillhouse.student_trainer.train.contexts.source import FeedSettings
from stillhouse.student_trainer.train.contexts.student_feed import StudentFeed
from stillhouse.student_trainer.train.contexts.warm_start import WarmStart
from stillhouse.student_trainer.train.data.corpus import load_corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.process.waiting import TeacherWait
from stillhouse.student_trainer.train.rollouts.local_sampler import LocalSampler
from stillhouse.student_trainer.train.rollouts.rollout_buffer import Rollout, RolloutBuffer
from stillhouse.student_trainer.train.teacher.online_teachers import OnlineTeachers
from stillhouse.student_trainer.train.teacher.target_requests import training_request
from stillhouse.student_trainer.train.teacher.teacher import Demands
from stillhouse.student_trainer.train.teacher.tokenizer_compat import compare
from tests.conftest import Models
from tests.student_trainer.train.runs import make_run, spec_of
from tests.student_trainer.train.students import CPU, make_sampler
from tests.support.programs import Program

T, V = 6, 40


def _dense(seed: int) -> np.ndarray:
    """Log-probabilities [T, V]."""
    logits = np.random.default_rng(seed).normal(size=(T, V)) * 2
    logprobs: np.ndarray = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logprobs


def _answer(dense: np.ndarray, sequence: np.ndarray, top_k: int) -> Distributions:
    ids = np.argsort(-dense, axis=1)[:, :top_k].astype(np.int32)
    logprobs = np.take_along_axis(dense, ids, 1)
    rest = np.exp(dense).sum(1) - np.exp(logprobs).sum(1)
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.maximum(rest, 0)) if top_k < V else np.full(T, -np.inf)
    return Distributions(
        start=1,
        token_ids=ids,
        logprobs=logprobs.astype(np.float32),
        target_logprobs=dense[np.arange(T), sequence[1:]].astype(np.float32),
        log_tail=log_tail.astype(np.float32),
    )


SEQUENCE = np.random.default_rng(5).integers(0, V, T + 1).astype(np.int32)


def test_a_query_joins_the_support_and_leaves_the_rest_in_the_tail() -> None:
    dense = _dense(0)
    query = np.argsort(_dense(1), axis=1)[:, :7].astype(np.int32)
    answer = replace(
        _answer(dense, SEQUENCE, 5), query_logprobs=np.take_along_axis(dense, query, 1).astype(np.float32)
    )
    joined, clamped = with_query(answer, query, SEQUENCE)
    assert clamped == 0
    for t in range(T):
        kept = joined.token_ids[t][joined.token_ids[t] >= 0]
        assert len(set(kept)) == len(kept)
        assert set(kept) == {*answer.token_ids[t], *query[t], SEQUENCE[t + 1]}
        np.testing.assert_allclose(joined.logprobs[t][joined.token_ids[t] >= 0], dense[t][kept], rtol=1e-5)
        rest = 1 - np.exp(dense[t][kept]).sum()
        assert joined.log_tail[t] == pytest.approx(np.log(rest), abs=1e-4)


def test_the_teachers_draws_from_outside_the_joined_support_remain() -> None:
    dense = _dense(0)
    query = np.argsort(_dense(1), axis=1)[:, :7].astype(np.int32)
    draws = np.sort(np.argsort(-dense, axis=1)[:, 5:], axis=1).astype(
        np.int32
    )  # the whole tail, each token once
    answer = replace(
        _answer(dense, SEQUENCE, 5),
        query_logprobs=np.take_along_axis(dense, query, 1).astype(np.float32),
        sampled_token_ids=draws,
        sampled_logprobs=np.take_along_axis(dense, draws, 1).astype(np.float32),
    )
    joined, _ = with_query(answer, query, SEQUENCE)
    found = target_rows(joined, np.arange(T), "stratified_tail")
    assert found.draw_shares is not None
    for t in range(T):
        drawn = found.draw_shares[t] > 0
        outside = set(range(V)) - set(joined.token_ids[t])
        assert set(found.token_ids[t][drawn]) == outside
        assert found.draw_shares[t][drawn] == pytest.approx(1 / len(outside))
        np.testing.assert_allclose(found.logprobs[t][drawn], dense[t][found.token_ids[t][drawn]], rtol=1e-5)


def test_a_tail_that_a_query_uses_up_is_lifted_and_counted() -> None:
    dense = _dense(0)
    query = np.tile(np.arange(V, dtype=np.int32), (T, 1))
    answer = replace(_answer(dense, SEQUENCE, 5), query_logprobs=dense.astype(np.float32))
    joined, clamped = with_query(answer, query, SEQUENCE)
    assert clamped == T
    assert joined.log_tail == pytest.approx(np.log(TAIL_FLOOR))


@pytest.mark.parametrize("top_k", [V, 6])
def test_a_mixture_of_whole_or_equal_supports_is_exact(top_k: int) -> None:
    first = _dense(0)
    second = _dense(1) if top_k == V else np.log(0.9 * np.exp(first) + 0.1 / V)
    mixed = mix([_answer(first, SEQUENCE, top_k), _answer(second, SEQUENCE, top_k)], [1.0, 3.0], vocab_size=V)
    expected = np.log(0.25 * np.exp(first) + 0.75 * np.exp(second))
    for t in range(T):
        kept = mixed.token_ids[t][mixed.token_ids[t] >= 0]
        assert len(kept) == top_k
        np.testing.assert_allclose(mixed.logprobs[t][: len(kept)], expected[t][kept], rtol=1e-4, atol=1e-5)
        assert (np.diff(mixed.logprobs[t][: len(kept)]) <= 0).all()
    np.testing.assert_allclose(mixed.target_logprobs, expected[np.arange(T), SEQUENCE[1:]], rtol=1e-5)


def test_a_mixture_of_different_supports_is_a_distribution() -> None:
    answers = [_answer(_dense(seed), SEQUENCE, 5) for seed in (0, 1, 2)]
    mixed = mix(answers, [1, 1, 1], vocab_size=V)
    mass = np.exp(mixed.logprobs.astype(np.float64)).sum(1) + np.exp(mixed.log_tail.astype(np.float64))
    assert mass == pytest.approx(1, abs=1e-5)
    union = [set(np.concatenate([answer.token_ids[t] for answer in answers])) for t in range(T)]
    assert [set(row[row >= 0]) for row in mixed.token_ids] == union


def _tokenizer(tokens: list[str], **changes: Any) -> str:
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": ["a b"]}
    return json.dumps(
        {"model": model | changes, "added_tokens": [], "normalizer": None, "pre_tokenizer": None}
    )


@pytest.mark.parametrize(
    ("teacher", "kind", "shared"),
    [
        (_tokenizer(["a", "b", "ab"]), "identical", 3),
        (_tokenizer(["a", "b", "ab", "<extra>"]), "compatible", 3),
        (_tokenizer(["a", "b"]), "compatible", 2),
        (_tokenizer(["b", "a", "ab"]), "foreign", 0),
        (_tokenizer(["a", "b", "ab"], merges=[]), "foreign", 0),
    ],
)
def test_vocabularies_are_compared_token_by_token(teacher: str, kind: str, shared: int) -> None:
    verdict = compare(_tokenizer(["a", "b", "ab"]), teacher)
    assert (verdict.kind, verdict.shared_size) == (kind, shared)
    assert (kind == "foreign") == bool(verdict.why)


def test_a_tokenizer_that_is_none_is_refused() -> None:
    with pytest.raises(StillhouseError) as caught:
        compare(_tokenizer(["a"]), "[1]")
    assert caught.value.reason is Reason.TOKENIZER_INVALID


@pytest.fixture(scope="module")
def sampler(models: Models) -> LocalSampler:
    return make_sampler(models.student, num_likeliest=4)


def test_a_rollout_records_what_it_was_drawn_from(sampler: LocalSampler) -> None:
    prompts = [np.array([5, 6, 7], np.int32), np.array([9], np.int32)]
    generation = RolloutConfig(max_new_tokens=6, samples_per_prompt=3)
    texts = sampler.write(prompts, generation, max_sequence_tokens=7, seeds=[1, 2])
    again = sampler.write(prompts, generation, max_sequence_tokens=7, seeds=[1, 2])
    other = sampler.write(prompts, generation, max_sequence_tokens=7, seeds=[3, 4])
    assert [len(each) for each in texts] == [3, 3]
    drawn = [text.token_ids.tolist() for each in texts for text in each]
    assert drawn == [text.token_ids.tolist() for each in again for text in each]
    assert drawn != [text.token_ids.tolist() for each in other for text in each]
    model = sampler._student.model
    for prompt, several in zip(prompts, texts, strict=True):
        for text in several:
            assert len(prompt) + len(text.token_ids) <= 7
            ids = torch.from_numpy(np.concatenate([prompt, text.token_ids]).astype(np.int64)).unsqueeze(0)
            with torch.no_grad():
                logits = model.eval()(ids).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(-1, ids[0, len(prompt) :, None]).squeeze(-1)
            np.testing.assert_allclose(text.logprobs, logprobs.numpy(), atol=2e-5)
            assert text.likeliest[:, 0].tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("pass_tokens", [1, 2, 4096])
def test_any_cut_of_rollouts_draws_the_same(sampler: LocalSampler, pass_tokens: int) -> None:
    prompts = [np.arange(4, 4 + length, dtype=np.int32) for length in (3, 20, 1, 9, 20)]
    generation = RolloutConfig(max_new_tokens=6, samples_per_prompt=2)
    rooms: dict[str, Any] = {"max_sequence_tokens": 22}
    seeds = [1, 2, 3, 4, 5]
    expected = sampler.write(prompts, generation, **rooms, seeds=seeds)
    by_tokens = LocalSampler(
        sampler._student,
        device=CPU,
        autocast=torch.no_grad,
        vocab_size=len(sampler._student.tokenizer),
        num_likeliest=4,
        pass_tokens=lambda: pass_tokens,
    )
    for several, others in zip(
        by_tokens.write(prompts, generation, **rooms, seeds=seeds), expected, strict=True
    ):
        for text, other in zip(several, others, strict=True):
            assert text.token_ids.tolist() == other.token_ids.tolist()
            np.testing.assert_allclose(text.logprobs, other.logprobs, atol=2e-5)


def test_a_rollout_that_is_too_old_is_counted_and_never_learnt_from(
    sampler: LocalSampler, models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    spec = spec_of(models.student, dataset_file, hf_teacher.target)
    run_dir = make_run(tmp_path, "stale", spec)
    config = from_proto(run_dir.effective_spec())
    tokenizer = sampler._student.tokenizer
    corpus = load_corpus(config.data, config.evaluation, tokenizer, tmp_path)
    in_flight = RolloutBuffer()
    in_flight.rollouts[0, 6] = [_rollout(corpus.train[number], number, 5 - number) for number in range(3)]
    restored = RolloutBuffer()
    restored.restore(in_flight.state())
    with run_dir.open_attempt(1) as attempt, ExitStack() as stack:
        patience = TeacherWait(attempt, lambda: False, 30)
        text = tokenizer.backend_tokenizer.to_str()
        fingerprint = tokenizer_fingerprint(text, tokenizer.special_tokens_map)
        teachers = OnlineTeachers.connect(
            config,
            Demands.from_config(config, fingerprint, text, corpus),
            run_dir,
            patience=patience,
            stack=stack,
        )
        targets = teachers.open_stream(training_request(config.loss, 0), cacheable=False)
        stack.callback(targets.close)
        gate = WarmStart(None, vocab_size=40, alone=True, field_path="", is_open=True)
        feed = StudentFeed(
            FeedSettings(
                context=0,
                examples=corpus.train,
                seed=0,
                ahead=2,
                max_sequence_tokens=64,
                patience=patience,
            ),
            targets,
            sampler,
            StudentContextConfig(),
            in_flight=restored,
            version=lambda: 6,
            gate=gate,
            queries_top_k=False,
            queries_parts=lambda: False,
            max_staleness=1,
        )
        assert feed.ahead == 1
        feed.request(6, [])
        taken = list(feed.collect(6))
    assert [each.example.place for each in taken] == ["rollout 0"]
    # Only what was written counts: the prompt's tokens are no targets.
    assert [each.example.num_targets for each in taken] == [2]
    assert feed.metrics["train/rollouts_dropped"] == 2
    assert feed.metrics["train/rollout_staleness"] == pytest.approx((1 + 2 + 3) / 3)


def _rollout(example: Example, number: int, version: int) -> Rollout:
    token_ids = example.token_ids[: len(example.prompt) + 2]
    return Rollout(
        token_ids=token_ids,
        start=len(example.prompt),
        behaviour_logprobs=np.zeros(2, np.float32),
        likeliest=np.zeros((2, 0), np.int32),
        finished=False,
        version=version,
        place=f"rollout {number}",
        teacher="",
    )
