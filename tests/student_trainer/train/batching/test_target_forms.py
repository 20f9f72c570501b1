"""Forms of sparse targets: what is drawn has the teacher as its expectation, and every form is a distribution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.teacher_pb2 import CAPABILITY_SAMPLED_TOKENS, GetTeacherInfoResponse
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.config.schema import LossConfig, RunConfig
from stillhouse.student_trainer.train.batching.target_forms import (
    COMPILED_DRAWS,
    TargetForm,
    TargetRows,
    _sort,
    _walk,
    entropy,
    target_rows,
    token_factor,
)
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.loss.sparse import SparseTargets
from stillhouse.student_trainer.train.teacher.teacher import Demands, check_demands
from tests.student_trainer.train.loss.single_losses import forward_kl

V, K, R, ROWS = 9, 3, 6, 20_000


def _answer(*, draws: bool = True, top_k: int = K) -> tuple[Distributions, np.ndarray]:
    """ROWS answers of one distribution, each with draws of its own, and the distribution."""
    generator = np.random.default_rng(0)
    probs = generator.dirichlet(np.full(V, 0.7))
    ids = np.argsort(-probs)[:top_k]
    answer = Distributions(
        start=1,
        token_ids=np.tile(ids, (ROWS, 1)).astype(np.int32),
        logprobs=np.tile(np.log(probs[ids]), (ROWS, 1)).astype(np.float32),
        target_logprobs=np.zeros(ROWS, np.float32),
        log_tail=np.full(ROWS, np.log(1 - probs[ids].sum()), np.float32),
        sampled_token_ids=generator.choice(V, (ROWS, R), p=probs).astype(np.int32) if draws else None,
    )
    return answer, probs


def _targets(answer: Distributions, form: TargetForm) -> SparseTargets:
    found = target_rows(answer, np.arange(answer.num_rows), form)
    return SparseTargets(
        token_ids=torch.from_numpy(found.token_ids).long().unsqueeze(0),
        logprobs=torch.from_numpy(found.logprobs).unsqueeze(0),
        log_tail=torch.from_numpy(found.log_tail).unsqueeze(0),
    )


@pytest.mark.parametrize("form", ["tail_bucket", "sampled", "top_k_and_sampled"])
@pytest.mark.parametrize("top_k", [0, K])
def test_rows_are_distributions_over_distinct_ids(form: TargetForm, top_k: int) -> None:
    found = target_rows(_answer(top_k=top_k)[0], np.arange(ROWS), form)
    total = np.exp(found.logprobs).sum(1) + np.exp(found.log_tail)
    np.testing.assert_allclose(total, 1, atol=1e-6)
    ordered = np.sort(found.token_ids, axis=1)
    assert not ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()


def test_the_gradient_of_forward_kl_on_draws_is_unbiased() -> None:
    answer, probs = _answer()
    logits = torch.randn(1, 1, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = logits.expand(1, ROWS, V).clone().requires_grad_()
    forward_kl(rows, _targets(answer, "sampled"), torch.ones(1, ROWS)).loss_sum.backward()
    assert rows.grad is not None
    mean, error = rows.grad[0].mean(0), rows.grad[0].std(0) / ROWS**0.5
    expected = logits[0, 0].softmax(-1) - torch.from_numpy(probs)
    assert (mean - expected).abs().max() < 5 * error.max()


def test_top_k_stay_exact_and_draws_share_the_tail() -> None:
    answer, probs = _answer()
    found = target_rows(answer, np.arange(ROWS), "top_k_and_sampled")
    np.testing.assert_array_equal(found.token_ids[:, :K], answer.token_ids)
    np.testing.assert_allclose(found.logprobs[:, :K], answer.logprobs, atol=1e-6)
    drawn = np.isneginf(found.log_tail)
    tail = np.setdiff1d(np.arange(V), answer.token_ids[0])
    share = np.array([np.exp(found.logprobs)[drawn][found.token_ids[drawn] == i].sum() for i in tail])
    np.testing.assert_allclose(share / drawn.sum(), probs[tail], atol=5 * (1 / ROWS) ** 0.5)
    assert (1 - drawn.mean()) == pytest.approx(probs[answer.token_ids[0]].sum() ** R, abs=0.02)


def test_without_draws_the_drawn_forms_are_refused() -> None:
    with pytest.raises(StillhouseError, match="CAPABILITY_SAMPLED_TOKENS") as error:
        target_rows(_answer(draws=False)[0], np.arange(3), "sampled")
    assert error.value.reason is Reason.CAPABILITY


def test_a_teacher_that_cannot_draw_is_refused_before_training() -> None:
    example = Example(token_ids=np.arange(3, dtype=np.int32), mask=np.arange(3) > 0, place="row 1")
    config = replace(RunConfig(), loss=LossConfig(sparse_target="sampled"))
    demands = Demands.from_config(config, "f", "{}", Corpus(train=[example], eval=[], dataset_sizes=[1]))
    info = GetTeacherInfoResponse(
        tokenizer_fingerprint="f", tokenizer_size=9, vocab_size=9, max_top_k=64, max_sequence_tokens=9
    )
    with pytest.raises(StillhouseError, match="targets that the teacher draws"):
        check_demands(demands, info, "here:1")
    info.capabilities.append(CAPABILITY_SAMPLED_TOKENS)
    check_demands(demands, info, "here:1")


def test_entropy_without_the_teachers_is_that_of_the_buckets() -> None:
    answer, probs = _answer()
    full = float(-(probs * np.log(probs)).sum())
    tail_mass = float(np.exp(answer.log_tail[0]))
    found = entropy(answer, np.arange(1))[0]
    assert found <= full <= found + tail_mass * np.log(V - K) + 1e-6
    confidence = token_factor(np.array([0.0, np.log(V)]), "teacher_confidence", V)
    np.testing.assert_allclose(confidence, [1, 0], atol=1e-12)


def test_draws_in_order_are_counted_as_those_in_any_order() -> None:
    generator = np.random.default_rng(1)
    shape = 500, 80
    draws = generator.integers(-1, 60, shape).astype(np.int32)
    draws[7] = 5
    besides = np.stack([generator.permutation(60)[:9] for _ in range(shape[0])]).astype(np.int32)
    wanted = generator.random(shape[0]) < 0.9
    assert draws.size >= COMPILED_DRAWS
    ordered = np.sort(draws, axis=1)
    compiled, plain = _walk(ordered, besides, wanted), _sort(ordered, besides, wanted)
    assert compiled is not None
    for of_walk, of_sort in zip(compiled, plain, strict=True):
        np.testing.assert_array_equal(of_walk, of_sort)
    assert _walk(draws, besides, wanted) is None
    for of_draws, of_ordered in zip(_sort(draws, besides, wanted)[:2], plain[:2], strict=True):
        np.testing.assert_array_equal(of_draws, of_ordered)
    ids, counts, places = plain
    assert counts[7].sum() == (0 if 5 in besides[7] or not wanted[7] else shape[1])
    row, column = np.nonzero(ids >= 0)
    np.testing.assert_array_equal(ordered[row, places[row, column]], ids[row, column])
    expected = [
        sum(int(each >= 0) for each in drawn if each not in kept) if is_wanted else 0
        for drawn, kept, is_wanted in zip(draws.tolist(), besides.tolist(), wanted, strict=True)
    ]
    assert counts.sum(axis=1).tolist() == expected


def test_own_draws_in_order_weigh_what_those_in_any_order_do() -> None:
    """Some are repeated, some kept, some empty; two rows have no tail."""
    generator = np.random.default_rng(1)
    rows, num_draws, num_ids = 40, 150, 300
    assert rows * num_draws >= COMPILED_DRAWS
    ids = generator.integers(-1, num_ids, (rows, num_draws)).astype(np.int32)
    logprobs, proposed = np.log(generator.dirichlet(np.ones(num_ids), (2, rows))).astype(np.float32)
    log_tail = np.where(np.arange(rows) < 2, -np.inf, -1).astype(np.float32)
    kept = np.tile(np.arange(0, 60, 7, dtype=np.int32), (rows, 1))

    def found(draws: np.ndarray) -> TargetRows:
        answer = Distributions(
            start=1,
            token_ids=kept[:, ::-1],
            logprobs=np.take_along_axis(logprobs, kept[:, ::-1], 1),
            target_logprobs=np.zeros(rows, np.float32),
            log_tail=log_tail,
            sampled_token_ids=draws,
            sampled_logprobs=np.take_along_axis(logprobs, draws, 1),
        )
        own = np.take_along_axis(proposed, draws, 1)
        return target_rows(answer, np.arange(rows), "student_tail", draw_logprobs=own)

    walked, sorted_out = found(np.sort(ids, axis=1)), found(ids)
    assert (walked.token_ids[2:, kept.shape[1] :] >= 0).sum() > COMPILED_DRAWS / 4
    pairs: Any = zip(walked, sorted_out, strict=True)
    for one, other in pairs:
        np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_array_equal(walked.token_ids[:2, kept.shape[1] :], -1)
