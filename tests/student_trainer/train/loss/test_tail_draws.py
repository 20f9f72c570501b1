"""Estimates from draws of the tail: their means are the dense float64 values and gradients, and their draws are bounded."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor as TensorMessage
from stillhouse.protos.tensors.distributions import (
    Distributions,
    decode_distributions,
    encode_distributions,
    packed_bits,
)
from stillhouse.student_trainer.config.rules.loss import takes_draw_logprobs
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.config.settled.target_choice import DRAW_LOGPROB_BITS
from stillhouse.student_trainer.train.batching.target_forms import target_rows
from stillhouse.student_trainer.train.loss import tail_draws
from stillhouse.student_trainer.train.loss.divergences import DIVERGENCES
from stillhouse.student_trainer.train.loss.fused import OutputLayer, fused_objective
from stillhouse.student_trainer.train.loss.objective import Positions, objective
from stillhouse.student_trainer.train.loss.sparse import DenseTargets, SparseTargets, Targets
from stillhouse.student_trainer.train.loss.tail_draws import MIN_CONTROLLED_DRAWS
from stillhouse.teacher_service.distributions.draws import sampled_ids
from tests.student_trainer.train.loss.dense_reference import random_logits

V, K, R, ROWS = 30, 3, 5, 6000
CASES: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "jsd": {"beta": 0.5},
    "jsd, beta 0.9": {"beta": 0.9},
    "jsd_normalised": {"beta": 0.1},
    "tvd": {},
    "skew_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "alpha_beta": {"alpha": 0.5, "beta": 0.5},
}


def term_of(case: str) -> LossTermConfig:
    return LossTermConfig(divergence=case.partition(",")[0], **CASES[case])


def drawn_targets(
    teacher_logits: Tensor, temperature: float, *, rows: int = ROWS, seed: int = 0
) -> SparseTargets:
    """Rows of one teacher, [V], each with draws of its own from outside the top-k, as a service sends them."""
    logprobs = teacher_logits.double().log_softmax(-1)
    top = logprobs.topk(K)
    tail = logprobs.index_fill(0, top.indices, -torch.inf)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.multinomial(
        (tail / temperature).softmax(-1), rows * R, replacement=True, generator=generator
    )
    answer = Distributions(
        start=1,
        token_ids=top.indices.int().expand(rows, K).numpy(),
        logprobs=top.values.float().expand(rows, K).numpy(),
        target_logprobs=np.zeros(rows, np.float32),
        log_tail=tail.logsumexp(-1).float().expand(rows).numpy(),
        sampled_token_ids=draws.int().view(rows, R).numpy(),
        sampled_logprobs=logprobs[draws].float().view(rows, R).numpy(),
    )
    found = target_rows(answer, np.arange(rows), "sampled_tail")
    assert found.draw_shares is not None
    np.testing.assert_allclose(found.draw_shares.sum(1), 1)
    assert np.exp(found.logprobs[:, :K]).sum(1) + np.exp(found.log_tail) == pytest.approx(1, abs=1e-6)
    partition = (logprobs / temperature).logsumexp(-1).expand(1, rows)
    return SparseTargets(
        token_ids=torch.from_numpy(found.token_ids).long().unsqueeze(0),
        logprobs=torch.from_numpy(found.logprobs).unsqueeze(0),
        log_tail=torch.from_numpy(found.log_tail).unsqueeze(0),
        log_partition=None if temperature == 1 else partition,
        draw_shares=torch.from_numpy(found.draw_shares).unsqueeze(0),
    )


def stratified_targets(
    teacher_logits: Tensor, loss: LossConfig, *, rows: int = 4000, bits: int = 12, count: int = 7
) -> SparseTargets:
    """Rows of one teacher, [V], with stratified draws at evenly spread places, as a service sends them on the wire."""
    temperature, vocab_size = loss.temperature, len(teacher_logits)
    logprobs = teacher_logits.double().log_softmax(-1)
    top = logprobs.topk(K)
    tail = logprobs.index_fill(0, top.indices, -torch.inf)
    numbers = (torch.arange(count) + (torch.arange(rows).unsqueeze(-1) + 0.5) / rows) / count
    draws = sampled_ids((tail / temperature).expand(rows, vocab_size), numbers.double()).long()
    partition = (logprobs / temperature).logsumexp(-1)
    answer = Distributions(
        start=1,
        token_ids=top.indices.int().expand(rows, K).numpy(),
        logprobs=top.values.float().expand(rows, K).numpy(),
        target_logprobs=np.zeros(rows, np.float32),
        log_tail=tail.logsumexp(-1).float().expand(rows).numpy(),
        log_partitions=partition.float().expand(rows, 1).numpy(),
        sampled_token_ids=draws.int().numpy(),
        sampled_logprobs=logprobs[draws].float().numpy() if takes_draw_logprobs(loss) else None,
    )
    message = encode_distributions(
        answer,
        logprob_dtype=TensorMessage.DATA_TYPE_FLOAT32,
        sort_bits=packed_bits(vocab_size),
        sampled_logprob_bits=bits,
    )
    answer = decode_distributions(message, vocab_size=vocab_size, max_rows=rows, max_top_k=K)
    found = target_rows(answer, np.arange(rows), "stratified_tail", temperature=temperature)
    shares = found.draw_shares
    assert (shares is None) == (not takes_draw_logprobs(loss))
    return SparseTargets(
        token_ids=torch.from_numpy(found.token_ids).long().unsqueeze(0),
        logprobs=torch.from_numpy(found.logprobs).unsqueeze(0),
        log_tail=torch.from_numpy(found.log_tail).unsqueeze(0),
        log_partition=None if temperature == 1 else partition.expand(1, rows),
        draw_shares=None if shares is None else torch.from_numpy(shares).unsqueeze(0),
    )


def value_and_gradients(logits: Tensor, targets: Targets, loss: LossConfig) -> tuple[float, Tensor]:
    """Sum over rows, and [rows, V]."""
    leaf = logits.clone().requires_grad_()
    shape = leaf.shape[:2]
    summed = objective(leaf, torch.zeros(shape, dtype=torch.long), targets, torch.ones(shape), loss)
    summed.loss_sum.backward()
    assert leaf.grad is not None
    return summed.loss_sum.item(), leaf.grad[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_mean_over_draws_is_the_dense_value_and_gradient(
    case: str, same: bool, temperature: float
) -> None:
    """With the student as its teacher the gradient's mean is 0, and the value is 0 for every draw."""
    teacher = random_logits(V, seed=4, dtype=torch.float64)
    student = teacher if same else random_logits(V, seed=5, dtype=torch.float64)
    loss = LossConfig(terms=(term_of(case),), temperature=temperature)
    dense = DenseTargets(logprobs=teacher.log_softmax(-1).view(1, 1, V))
    expected, gradient = value_and_gradients(student.view(1, 1, V), dense, loss)
    value, gradients = value_and_gradients(
        student.expand(1, ROWS, V), drawn_targets(teacher, temperature), loss
    )
    tolerance = 1e-6 if same else 0.02 * temperature * max(expected, 0.1)
    assert value / ROWS == pytest.approx(expected, abs=tolerance)
    if same and case == "tvd":
        return  # it has a kink there: its gradient is the signs of rounding errors
    error = gradients.std(0) / ROWS**0.5
    assert ((gradients.mean(0) - gradient[0]).abs() < 5 * error + 1e-6).all()
    assert error.max() < 0.02 * temperature  # what was averaged tells something


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_mean_over_stratified_draws_is_the_dense_gradient(
    case: str, same: bool, temperature: float
) -> None:
    """Over all places, so that nothing but rounding is left; a student that is its teacher has the gradient 0 in the mean."""
    teacher = random_logits(V, seed=4, dtype=torch.float64)
    student = teacher if same else random_logits(V, seed=5, dtype=torch.float64)
    loss = LossConfig(terms=(term_of(case),), temperature=temperature)
    dense = DenseTargets(logprobs=teacher.log_softmax(-1).view(1, 1, V))
    expected, gradient = value_and_gradients(student.view(1, 1, V), dense, loss)
    targets = stratified_targets(teacher, loss)
    value, gradients = value_and_gradients(student.expand(1, 4000, V), targets, loss)
    if takes_draw_logprobs(loss):
        assert value / 4000 == pytest.approx(expected, abs=2e-3 * temperature**2)
    if same and case == "tvd":
        return  # it has a kink there: its gradient is the signs of rounding errors
    assert (gradients.mean(0) - gradient[0]).abs().max() < 5e-4 * temperature
    assert gradients.std(0).max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_a_control_variate_is_steadier_and_moves_the_mean_by_little(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 draws of 400 tokens at temperature 4: the same mean over places, but for a hundredth of the variance of one row."""
    vocab_size, rows = 400, 250
    teacher = random_logits(vocab_size, seed=4, dtype=torch.float64)
    student = teacher + 0.5 * random_logits(vocab_size, seed=5, dtype=torch.float64)
    loss = LossConfig(terms=(term_of(case),), temperature=4.0)
    dense = DenseTargets(logprobs=teacher.log_softmax(-1).view(1, 1, vocab_size))
    expected, gradient = value_and_gradients(student.view(1, 1, vocab_size), dense, loss)
    targets = stratified_targets(teacher, loss, rows=rows, count=64)
    variances = []
    for fewest in (vocab_size, MIN_CONTROLLED_DRAWS):
        monkeypatch.setattr(tail_draws, "MIN_CONTROLLED_DRAWS", fewest)
        value, gradients = value_and_gradients(student.expand(1, rows, vocab_size), targets, loss)
        variances.append(float(gradients.var(0).sum()))
        assert value / rows == pytest.approx(expected, rel=0.04)
        assert (gradients.mean(0) - gradient[0]).square().sum() < 1e-2 * variances[-1]
    assert variances[1] < (0.9 if case == "tvd" else 0.5) * variances[0]


@pytest.mark.parametrize(
    ("temperature", "sharpness", "distance"),
    [(2.0, 1.0, 4.0), (2.0, 3.0, 1.0), (4.0, 3.0, 3.0), (4.0, 6.0, 0.1)],
)
@pytest.mark.parametrize("case", CASES)
def test_a_control_variate_harms_neither_far_students_nor_sharp_teachers(
    case: str, temperature: float, sharpness: float, distance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student that knows nothing of its teacher likes tokens that hardly any draw hits. Unguarded, the squared error grew up to
    100,000 times."""
    vocab_size, rows = 2000, 100
    teacher = sharpness * random_logits(vocab_size, seed=4, dtype=torch.float64)
    student = distance * random_logits(vocab_size, seed=5, dtype=torch.float64)
    loss = LossConfig(terms=(term_of(case),), temperature=temperature)
    dense = DenseTargets(logprobs=teacher.log_softmax(-1).view(1, 1, vocab_size))
    _, gradient = value_and_gradients(student.view(1, 1, vocab_size), dense, loss)
    targets = stratified_targets(teacher, loss, rows=rows, count=128)
    errors = []
    for fewest in (vocab_size, MIN_CONTROLLED_DRAWS):
        monkeypatch.setattr(tail_draws, "MIN_CONTROLLED_DRAWS", fewest)
        _, gradients = value_and_gradients(student.expand(1, rows, vocab_size), targets, loss)
        errors.append(float((gradients - gradient[0]).square().sum()))
    assert errors[1] < 1.6 * errors[0]


@pytest.mark.parametrize("case", [case for case in CASES if case != "tvd"])
def test_draws_in_few_bits_move_a_student_that_equals_its_teacher_by_less_than_a_ten_thousandth_nat(
    case: str,
) -> None:
    """The gradient's mean g at student = teacher shifts the optimum by a KL of about g^2 / (2 q), summed over tokens."""
    teacher = random_logits(V, seed=4, dtype=torch.float64)
    loss = LossConfig(terms=(term_of(case),))
    targets = stratified_targets(teacher, loss, bits=DRAW_LOGPROB_BITS)
    _, gradients = value_and_gradients(teacher.expand(1, 4000, V), targets, loss)
    # jsd_normalised is scaled so that its curvature is that of KL; the others have less.
    assert (gradients.mean(0).square() / (2 * teacher.softmax(-1))).sum() < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_no_draw_has_a_gradient_without_bound(case: str) -> None:
    """r (f'(r) - c) of a token that the student likes e^40 times as much, and of one that it likes as much less."""
    spec, term = DIVERGENCES[term_of(case).divergence], term_of(case)
    assert spec.generator is not None
    ratios = torch.linspace(-40, 40, 801, dtype=torch.float64).requires_grad_()
    values = partial(spec.generator, **term.parameters)(ratios)
    (gradient,) = torch.autograd.grad(values.sum(), ratios)
    if case == "alpha_beta":  # its square is, in the mean: E[r] = Q / P
        assert (gradient.square() <= 4.001 * ratios.detach().exp()).all()
        return
    scale = {"jsd_normalised": 1 / 0.09, "skew_reverse_kl": 2.0}.get(case, 1.0)
    assert torch.isfinite(values).all()
    assert (gradient.abs() <= scale + 1e-9).all()
    half = values.detach().float()
    single = partial(spec.generator, **term.parameters)(ratios.detach().float())
    torch.testing.assert_close(single, half, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_the_fused_objective_estimates_the_same(case: str, temperature: float) -> None:
    rows, width = 7, 6
    loss = LossConfig(terms=(term_of(case),), temperature=temperature, hard_weight=0.3)
    targets = drawn_targets(random_logits(V, seed=6, dtype=torch.float64), temperature, rows=rows)
    weight = random_logits(V, width, seed=7, dtype=torch.float64).requires_grad_()
    hidden = random_logits(rows, width, seed=8, dtype=torch.float64).requires_grad_()
    positions = Positions(
        target_ids=torch.arange(rows).unsqueeze(0), weights=torch.ones(1, rows), targets=targets
    )
    found = []
    for fused in (True, False):
        summed = (
            fused_objective(hidden, OutputLayer(weight=weight), positions, loss, chunk_logits=3 * V)
            if fused
            else objective(
                (hidden @ weight.T).unsqueeze(0), positions.target_ids, targets, positions.weights, loss
            )
        )
        found.append((summed.loss_sum.detach(), *torch.autograd.grad(summed.loss_sum, (hidden, weight))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_draws_beyond_the_shared_vocabulary_and_rows_without_a_tail_count_for_nothing() -> None:
    """Values stay finite, and a student that equals its teacher has loss 0 there too."""
    teacher = random_logits(V, seed=4, dtype=torch.float64)
    targets = drawn_targets(teacher, 1.0, rows=4)
    leaf = teacher.expand(1, 4, V).clone().requires_grad_()
    weights, ids = torch.ones(1, 4), torch.zeros(1, 4, dtype=torch.long)
    summed = objective(leaf, ids, targets, weights, LossConfig(), vocab_size=V // 2)
    assert summed.loss_sum.item() == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(summed.loss_sum, leaf)
    assert torch.isfinite(gradient).all()

    empty = SparseTargets(
        token_ids=torch.arange(V).view(1, 1, V),
        logprobs=teacher.log_softmax(-1).view(1, 1, V),
        log_tail=torch.full((1, 1), -torch.inf),
        draw_shares=torch.zeros(1, 1, V),
    )
    leaf = random_logits(1, 1, V, seed=9, dtype=torch.float64).requires_grad_()
    summed = objective(leaf, ids[:, :1], empty, weights[:, :1], LossConfig())
    (gradient,) = torch.autograd.grad(summed.loss_sum, leaf)
    torch.testing.assert_close(gradient[0, 0], leaf.detach()[0, 0].softmax(-1) - teacher.softmax(-1))
