"""Losses as mathematics: against dense float64 references, closed-form gradients, limits and edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Bool, Float
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.train.loss.objective import objective
from stillhouse.student_trainer.train.loss.reduction import Reduction
from stillhouse.student_trainer.train.loss.sparse import PAD_ID, SparseTargets
from tests.student_trainer.train.loss.dense_reference import (
    dense_bucket_kl,
    dense_kl,
    random_logits,
    targets_of,
)
from tests.student_trainer.train.loss.single_losses import cross_entropy, forward_kl

B, T, V = 2, 5, 12
ONES = torch.ones(B, T)


def token_weights(mask: Bool[Tensor, "B T"], reduction: Reduction) -> Float[Tensor, "B T"]:
    """Returns the weight of each position, 0 where it is masked out.

    "token_mean" gives every token 1; the weights of all sequences sum to the number of tokens. "sequence_mean" gives
    a token 1 / tokens of its sequence; they sum to the number of sequences that have any.
    """
    weights = mask.float()
    if reduction == "token_mean":
        return weights
    return weights / weights.sum(-1, keepdim=True).clamp(min=1.0)


def test_whole_vocabulary_equals_the_dense_kl() -> None:
    teacher, student = random_logits(B, T, V, seed=1), random_logits(B, T, V, seed=2)
    loss = forward_kl(student, targets_of(teacher, V), ONES)
    assert loss.denominator == B * T
    assert loss.loss_sum.item() == pytest.approx(dense_kl(teacher, student).sum().item(), rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 3, 11])
def test_top_k_equals_the_dense_kl_of_the_buckets(top_k: int) -> None:
    teacher, student = random_logits(B, T, V, seed=1), random_logits(B, T, V, seed=2)
    loss = forward_kl(student, targets_of(teacher, top_k), ONES)
    assert loss.loss_sum.item() == pytest.approx(
        dense_bucket_kl(teacher, student, top_k).sum().item(), rel=1e-5
    )


@given(seed=st.integers(0, 10_000), top_k=st.integers(1, V), scale=st.sampled_from([0.1, 1.0, 5.0, 30.0]))
@settings(deadline=None, max_examples=60)
def test_buckets_bound_the_kl_from_below(seed: int, top_k: int, scale: float) -> None:
    teacher = random_logits(1, 1, V, seed=seed, scale=scale)
    student = random_logits(1, 1, V, seed=seed + 1, scale=scale)
    coarse = forward_kl(student, targets_of(teacher, top_k), torch.ones(1, 1)).loss_sum.item()
    full = dense_kl(teacher, student).item()
    assert -1e-6 <= coarse <= full * (1 + 1e-5) + 1e-5


@pytest.mark.parametrize("top_k", [1, 4, V])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("mode", ["exact", "conditional"])
def test_student_equal_to_teacher_has_loss_zero(top_k: int, temperature: float, mode: str) -> None:
    teacher = random_logits(B, T, V, seed=3).requires_grad_()
    targets = targets_of(teacher.detach(), top_k, temperature=temperature)
    loss = forward_kl(teacher, targets, ONES, temperature=temperature, mode=mode)
    loss.loss_sum.backward()
    assert abs(loss.loss_sum.item()) < 1e-5
    assert teacher.grad is not None
    assert teacher.grad.abs().max() < 1e-5


def test_gradient_is_the_closed_form() -> None:
    teacher, student = random_logits(B, T, V, seed=4), random_logits(B, T, V, seed=5).requires_grad_()
    targets = targets_of(teacher, 4)
    forward_kl(student, targets, ONES).loss_sum.backward()
    p, q = teacher.double().softmax(-1), student.detach().double().softmax(-1)
    kept = torch.zeros(B, T, V, dtype=torch.bool).scatter(-1, targets.token_ids, value=True)
    tail_p = p.masked_fill(kept, 0).sum(-1, keepdim=True)
    tail_q = q.masked_fill(kept, 0).sum(-1, keepdim=True)
    expected = torch.where(kept, q - p, q - tail_p * q / tail_q)
    assert student.grad is not None
    torch.testing.assert_close(student.grad.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("temperature", "mode"), [(1.0, "exact"), (2.0, "exact"), (0.5, "conditional")])
def test_gradcheck(temperature: float, mode: str) -> None:
    teacher = random_logits(1, 2, 7, seed=6)
    targets = targets_of(teacher, 3, temperature=temperature)
    weights = torch.ones(1, 2)

    def loss(logits: Tensor) -> Tensor:
        return forward_kl(logits, targets, weights, temperature=temperature, mode=mode).loss_sum

    student = random_logits(1, 2, 7, seed=7, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(loss, (student,))


def test_exact_temperature_equals_dense_at_whole_vocabulary() -> None:
    teacher, student = random_logits(B, T, V, seed=8), random_logits(B, T, V, seed=9)
    loss = forward_kl(student, targets_of(teacher, V, temperature=2.0), ONES, temperature=2.0)
    expected = 4.0 * dense_kl(teacher, student, 2.0).sum().item()
    assert loss.loss_sum.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_exact_temperature_equals_the_dense_buckets(temperature: float) -> None:
    teacher, student = random_logits(B, T, V, seed=8), random_logits(B, T, V, seed=9)
    loss = forward_kl(student, targets_of(teacher, 4, temperature=temperature), ONES, temperature=temperature)
    dense = dense_bucket_kl(teacher / temperature, student / temperature, 4).sum().item()
    assert loss.loss_sum.item() == pytest.approx(temperature**2 * dense, rel=1e-4)


def test_conditional_temperature_is_its_definition() -> None:
    temperature, top_k = 2.0, 4
    teacher, student = random_logits(B, T, V, seed=10), random_logits(B, T, V, seed=11)
    targets = targets_of(teacher, top_k)
    loss = forward_kl(student, targets, ONES, temperature=temperature, mode="conditional").loss_sum.item()
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    p_kept, q_kept = p.gather(-1, targets.token_ids), q.gather(-1, targets.token_ids)
    p_mass, q_mass = p_kept.sum(-1), q_kept.sum(-1)
    binary = p_mass * (p_mass / q_mass).log() + (1 - p_mass) * ((1 - p_mass) / (1 - q_mass)).log()
    p_t = (p_kept.log() / temperature).softmax(-1)
    q_t = (q_kept.log() / temperature).softmax(-1)
    within = (p_t * (p_t / q_t).log()).sum(-1)
    expected = (binary + p_mass * temperature**2 * within).sum().item()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_exact_temperature_needs_the_partition() -> None:
    with pytest.raises(ValueError, match="log_partition"):
        forward_kl(
            random_logits(B, T, V, seed=1),
            targets_of(random_logits(B, T, V, seed=2), 3),
            ONES,
            temperature=2.0,
        )


def test_half_precision_on_the_wire_keeps_the_loss_not_negative() -> None:
    teacher = random_logits(1, 64, V, seed=12)
    exact = targets_of(teacher, 6)
    rounded = SparseTargets(
        token_ids=exact.token_ids, logprobs=exact.logprobs.half().float(), log_tail=exact.log_tail
    )
    loss = forward_kl(teacher, rounded, torch.ones(1, 64)).loss_sum.item() / 64
    assert 0 <= loss < 1e-5


def _edge_cases() -> dict[str, tuple[Tensor, SparseTargets, Tensor]]:
    student = random_logits(1, 2, V, seed=13)
    teacher = random_logits(1, 2, V, seed=14)
    one_hot = torch.full((1, 2, V), -1e4).index_fill(-1, torch.tensor([3]), 1e4)
    forbidden = torch.full((1, 2, V), -torch.inf).index_fill(-1, torch.tensor([3]), 0.0)
    sharp_teacher = SparseTargets(
        token_ids=torch.tensor([[[3], [3]]]),
        logprobs=torch.zeros(1, 2, 1),
        log_tail=torch.full((1, 2), -torch.inf),
    )
    nothing = SparseTargets(
        token_ids=torch.full((1, 2, 3), PAD_ID),
        logprobs=torch.full((1, 2, 3), -torch.inf),
        log_tail=torch.full((1, 2), -torch.inf),
    )
    ones, zeros = torch.ones(1, 2), torch.zeros(1, 2)
    return {
        "p one-hot": (student, sharp_teacher, ones),
        "p one-hot from logits": (student, targets_of(one_hot, 4), ones),
        "q one-hot": (one_hot, targets_of(teacher, 4), ones),
        "both one-hot": (one_hot, targets_of(one_hot, 4), ones),
        "q forbids all but one": (forbidden, targets_of(teacher, 4), ones),
        "p = q": (teacher, targets_of(teacher, 4), ones),
        "K = 1": (student, targets_of(teacher, 1), ones),
        "K = V": (student, targets_of(teacher, V), ones),
        "K = V, q one-hot": (one_hot, targets_of(teacher, V), ones),
        "all masked": (student, nothing, zeros),
        "-inf pads": (student, targets_of(teacher, 3, pads=2), ones),
        "huge logits": (student * 1e4, targets_of(teacher, 4), ones),
        "masked NaN": (torch.full((1, 2, V), torch.nan), targets_of(teacher, 4), zeros),
    }


@pytest.mark.parametrize("case", list(_edge_cases()))
@pytest.mark.parametrize(("temperature", "mode"), [(1.0, "exact"), (2.0, "exact"), (2.0, "conditional")])
def test_edge_cases_are_finite(case: str, temperature: float, mode: str) -> None:
    logits, targets, weights = _edge_cases()[case]
    if temperature != 1.0 and mode == "exact":
        partition = torch.cat(
            [targets.logprobs.double() / 2, targets.log_tail.double().unsqueeze(-1) / 2], -1
        ).logsumexp(-1)
        partition = partition.masked_fill(torch.isneginf(partition), 0.0).float()
        targets = SparseTargets(
            token_ids=targets.token_ids,
            logprobs=targets.logprobs,
            log_tail=targets.log_tail,
            log_partition=partition,
        )
    logits = logits.clone().requires_grad_()
    loss = forward_kl(logits, targets, weights, temperature=temperature, mode=mode)
    loss.loss_sum.backward()
    assert math.isfinite(loss.loss_sum.item())
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    if case == "all masked":
        assert loss.loss_sum.item() == 0
        assert loss.denominator.item() == 0


def test_pads_change_nothing() -> None:
    teacher, student = random_logits(B, T, V, seed=15), random_logits(B, T, V, seed=16)
    plain = forward_kl(student, targets_of(teacher, 3), ONES).loss_sum
    padded = forward_kl(student, targets_of(teacher, 3, pads=4), ONES).loss_sum
    torch.testing.assert_close(plain, padded)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_teacher_outputs_are_refused(bad: float) -> None:
    with pytest.raises(StillhouseError, match="logprobs hold NaN") as error:
        SparseTargets(
            token_ids=torch.zeros(1, 1, 1, dtype=torch.int64),
            logprobs=torch.full((1, 1, 1), bad),
            log_tail=torch.zeros(1, 1),
        )
    assert error.value.reason is Reason.NON_FINITE


def test_unknown_teacher_ids_go_to_the_tail() -> None:
    teacher, student = random_logits(1, 3, V, seed=17), random_logits(1, 3, V, seed=18)
    effective = 8
    loss = forward_kl(student, targets_of(teacher, V), torch.ones(1, 3), vocab_size=effective).loss_sum.item()
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    known = (p * (p / q).log())[..., :effective].sum(-1)
    tail_p, tail_q = p[..., effective:].sum(-1), q[..., effective:].sum(-1)
    assert loss == pytest.approx((known + tail_p * (tail_p / tail_q).log()).sum().item(), rel=1e-5)


def test_a_narrower_student_learns_from_a_padded_teacher() -> None:
    teacher, student = random_logits(1, 3, V, seed=19), random_logits(1, 3, V - 4, seed=20).requires_grad_()
    loss = forward_kl(student, targets_of(teacher, V), torch.ones(1, 3)).loss_sum
    loss.backward()
    p = teacher[..., : V - 4].double().softmax(-1)
    q = student.detach().double().softmax(-1)
    assert loss.item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-5)


def test_masking_equals_deleting() -> None:
    teacher, student = random_logits(1, T, V, seed=21), random_logits(1, T, V, seed=22)
    student[0, 1] = torch.nan
    student.requires_grad_()
    weights = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]])
    ids = torch.arange(T).unsqueeze(0)
    masked = forward_kl(student, targets_of(teacher, 4), weights)
    masked_hard = cross_entropy(student, ids, weights)
    keep = [0, 2, 4]
    deleted = forward_kl(student[:, keep], targets_of(teacher[:, keep], 4), torch.ones(1, 3))
    deleted_hard = cross_entropy(student[:, keep], ids[:, keep], torch.ones(1, 3))
    torch.testing.assert_close(masked, deleted)
    torch.testing.assert_close(masked_hard, deleted_hard)
    (gradient,) = torch.autograd.grad(masked.loss_sum + masked_hard.loss_sum, student)
    (expected,) = torch.autograd.grad(deleted.loss_sum + deleted_hard.loss_sum, student)
    torch.testing.assert_close(gradient, expected)
    assert (gradient[0, [1, 3]] == 0).all()


def test_cross_entropy_equals_torch() -> None:
    student, ids = random_logits(B, T, V, seed=23), torch.randint(0, V, (B, T))
    expected = torch.nn.functional.cross_entropy(student.flatten(0, 1), ids.flatten(), reduction="sum")
    torch.testing.assert_close(cross_entropy(student, ids, ONES).loss_sum, expected)


LENGTHS = [2, 2, 2, 2, 16, 16, 16, 16]
CONFIG = LossConfig(terms=(LossTermConfig(weight=0.7),), hard_weight=0.3)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_micro_batches_change_nothing(reduction: Reduction) -> None:
    teacher, student = random_logits(8, 16, V, seed=24), random_logits(8, 16, V, seed=25)
    ids = torch.randint(0, V, (8, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(16).unsqueeze(0) < torch.tensor(LENGTHS).unsqueeze(1)
    count = token_weights(mask, reduction).sum()
    assert count.item() == pytest.approx(sum(LENGTHS) if reduction == "token_mean" else 8)

    def gradient(accumulation: int) -> Tensor:
        logits = student.clone().requires_grad_()
        for rows in torch.arange(8).chunk(accumulation):
            weights = token_weights(mask[rows], reduction)
            part = objective(logits[rows], ids[rows], targets_of(teacher[rows], 4), weights, CONFIG)
            (part.loss_sum / count).backward()
        assert logits.grad is not None
        return logits.grad

    whole = gradient(1)
    for accumulation in (2, 4, 8):
        torch.testing.assert_close(gradient(accumulation), whole, atol=1e-6, rtol=1e-6)


def test_sequence_mean_is_the_mean_of_means() -> None:
    teacher, student = random_logits(2, 4, V, seed=26), random_logits(2, 4, V, seed=27)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True]])
    loss = forward_kl(student, targets_of(teacher, V), token_weights(mask, "sequence_mean"))
    per_token = dense_kl(teacher, student)
    expected = (per_token[0, :2].mean() + per_token[1].mean()) / 2
    assert (loss.loss_sum / loss.denominator).item() == pytest.approx(expected.item(), rel=1e-5)


def test_objective_without_terms_needs_no_teacher() -> None:
    config = LossConfig(terms=(LossTermConfig(weight=0),), hard_weight=2.0)
    student, ids = random_logits(B, T, V, seed=28), torch.randint(0, V, (B, T))
    total = objective(student, ids, None, ONES, config)
    torch.testing.assert_close(total.loss_sum, 2 * cross_entropy(student, ids, ONES).loss_sum)
    assert set(total.parts) == {"cross_entropy"}
