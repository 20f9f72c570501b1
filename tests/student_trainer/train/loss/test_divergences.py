"""Every divergence as mathematics: its definition over the whole vocabulary, its bound, its limits, and published formulas."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from stillhouse.student_trainer.config.fields import Choices, fields_of
from stillhouse.student_trainer.config.schema import DIVERGENCE_PARAMETERS, LossTermConfig
from stillhouse.student_trainer.train.loss.divergences import (
    DIVERGENCES,
    adaptive_kl_divergence,
    alpha_beta_divergence,
)
from stillhouse.student_trainer.train.loss.sparse import DenseTargets, SparseTargets
from stillhouse.student_trainer.train.loss.temperature import TemperatureMode
from tests.student_trainer.train.loss.dense_reference import random_logits, targets_of
from tests.student_trainer.train.loss.single_losses import distillation_loss

B, T, V, K = 2, 4, 13, 5
ONES = torch.ones(B, T, dtype=torch.float64)
Formula = Callable[[Tensor, Tensor], Tensor]
"""(p, q), probabilities over the vocabulary in float64 -> loss per position."""


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1)


def _adaptive(p: Tensor, q: Tensor, mu: float) -> Tensor:
    """Follows Wu et al. 2404.02657, with the shares of ABKD's get_ratio."""
    order = p.sort(-1, descending=True)
    gaps = (p - q).abs().gather(-1, order.indices)
    in_rest = order.values.cumsum(-1) > mu
    in_rest[..., 0] = False
    head, rest = gaps.masked_fill(in_rest, 0).sum(-1), gaps.masked_fill(~in_rest, 0).sum(-1)
    return (head * _kl(p, q) + rest * _kl(q, p)) / (head + rest)


def _mse(p: Tensor, q: Tensor) -> Tensor:
    z, l = q.log(), p.log()  # noqa: E741 (the formula's name)
    return ((z - z.mean(-1, keepdim=True)) - (l - l.mean(-1, keepdim=True))).square().mean(-1)


def _jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


CASES: Mapping[str, tuple[str, Mapping[str, float], Formula]] = {
    "forward_kl": ("forward_kl", {}, _kl),
    "reverse_kl": ("reverse_kl", {}, lambda p, q: _kl(q, p)),
    "jsd": ("jsd", {"beta": 0.3}, lambda p, q: _jsd(p, q, 0.3)),
    "jsd 0": ("jsd", {"beta": 0.0}, _kl),
    "jsd 1": ("jsd", {"beta": 1.0}, lambda p, q: _kl(q, p)),
    "jsd_normalised": ("jsd_normalised", {"beta": 0.3}, lambda p, q: _jsd(p, q, 0.3) / 0.21),
    "tvd": ("tvd", {}, lambda p, q: (p - q).abs().sum(-1) / 2),
    "skew_kl": ("skew_kl", {"alpha": 0.1}, lambda p, q: _kl(p, 0.1 * p + 0.9 * q)),
    "skew_kl 0": ("skew_kl", {"alpha": 0.0}, _kl),
    "skew_reverse_kl": ("skew_reverse_kl", {"alpha": 0.1}, lambda p, q: _kl(q, 0.9 * p + 0.1 * q)),
    "alpha_beta": (
        "alpha_beta",
        {"alpha": 0.2, "beta": 0.8},
        lambda p, q: (1 - (p**0.2 * q**0.8).sum(-1)) / 0.16,
    ),
    "alpha_beta 1 0": ("alpha_beta", {"alpha": 1.0, "beta": 0.0}, _kl),
    "alpha_beta 0 1": ("alpha_beta", {"alpha": 0.0, "beta": 1.0}, lambda p, q: _kl(q, p)),
    "adaptive_kl": ("adaptive_kl", {"mu": 0.5}, lambda p, q: _adaptive(p, q, 0.5)),
    "mse": ("mse", {}, _mse),
}
F_DIVERGENCES = [name for name, case in CASES.items() if DIVERGENCES[case[0]].is_f_divergence]


def _pair(seed: int, *, scale: float = 2.0, size: int = V) -> tuple[Tensor, Tensor]:
    teacher = random_logits(B, T, size, seed=seed, scale=scale, dtype=torch.float64)
    return teacher, random_logits(B, T, size, seed=seed + 1, scale=scale, dtype=torch.float64)


def _targets(teacher: Tensor, top_k: int, temperature: float | None = None) -> SparseTargets:
    """`targets_of` in float64."""
    logprobs = teacher.log_softmax(-1)
    kept, ids = logprobs.topk(top_k, -1)
    tail = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1)
    partition = None if temperature is None else (logprobs / temperature).logsumexp(-1)
    return SparseTargets(token_ids=ids, logprobs=kept, log_tail=tail, log_partition=partition)


def _loss(
    case: str,
    student: Tensor,
    targets: SparseTargets | DenseTargets,
    temperature: float = 1.0,
    mode: TemperatureMode = "exact",
) -> Tensor:
    name, parameters, _ = CASES[case]
    weights = torch.ones(student.shape[:2], dtype=torch.float64)
    return distillation_loss(
        name, student, targets, weights, parameters=parameters, temperature=temperature, mode=mode
    ).loss_sum


def test_every_divergence_has_a_name_a_formula_and_its_parameters() -> None:
    assert set(DIVERGENCES) == {name for name, _, _ in CASES.values()}
    assert set(DIVERGENCES) == set(fields_of(LossTermConfig)["divergence"].rule(Choices) or ())
    for name, parameters, _ in CASES.values():
        assert set(parameters) == set(DIVERGENCE_PARAMETERS.get(name, ()))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_whole_vocabulary_and_dense_targets_are_the_definition(case: str, temperature: float) -> None:
    teacher, student = _pair(1)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    expected = temperature**2 * CASES[case][2](p, q).sum()
    sparse = _loss(case, student, _targets(teacher, V, temperature), temperature)
    dense = _loss(case, student, DenseTargets(logprobs=teacher.log_softmax(-1)), temperature)
    torch.testing.assert_close(sparse, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dense, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", sorted(set(CASES) - {"mse", "adaptive_kl"}))
def test_top_k_is_the_definition_on_the_buckets(case: str) -> None:
    teacher, student = _pair(3)
    targets = _targets(teacher, K)
    p, q = (
        torch.cat([kept := x.gather(-1, targets.token_ids), 1 - kept.sum(-1, keepdim=True)], -1)
        for x in (teacher.softmax(-1), student.softmax(-1))
    )
    expected = CASES[case][2](p, q).sum()
    torch.testing.assert_close(_loss(case, student, targets), expected, rtol=1e-7, atol=1e-9)


@given(seed=st.integers(0, 10_000), top_k=st.integers(1, V), scale=st.sampled_from([0.3, 2.0, 8.0]))
@settings(deadline=None, max_examples=25)
def test_buckets_bound_every_f_divergence_from_below(seed: int, top_k: int, scale: float) -> None:
    teacher, student = _pair(seed, scale=scale)
    for case in F_DIVERGENCES:
        full = CASES[case][2](teacher.softmax(-1), student.softmax(-1)).sum().item()
        for mode in ("exact", "conditional"):
            coarse = _loss(case, student, _targets(teacher, top_k), 1.0, mode).item()
            assert -1e-9 <= coarse <= full * (1 + 1e-9) + 1e-9, case


def test_other_sums_of_alpha_and_beta_break_the_bound() -> None:
    """A run therefore needs alpha + beta = 1: merging tokens can raise the others, which no f-divergence does."""
    raised = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        log_p, log_q = (
            (8 * torch.randn(2, 1, 1, 6, generator=generator, dtype=torch.float64)).log_softmax(-1).unbind(0)
        )
        coarse = [torch.cat([x[..., :1], x[..., 1:].logsumexp(-1, keepdim=True)], -1) for x in (log_p, log_q)]
        full = alpha_beta_divergence(log_p, log_q, alpha=0.8, beta=0.8)
        raised += int((alpha_beta_divergence(*coarse, alpha=0.8, beta=0.8) > full + 1e-9).item())
    assert raised > 0


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("temperature", "mode"), [(1.0, "exact"), (2.0, "exact"), (2.0, "conditional")])
def test_student_equal_to_teacher_has_loss_and_gradient_zero(
    case: str, temperature: float, mode: TemperatureMode
) -> None:
    teacher, _ = _pair(5)
    student = teacher.clone().requires_grad_()
    loss = _loss(case, student, _targets(teacher, K, temperature), temperature, mode)
    (gradient,) = torch.autograd.grad(loss, student)
    assert abs(loss.item()) < 1e-9
    if case != "tvd":  # at a tie its gradient is the sign of a rounding error
        assert gradient.abs().max() < 1e-7


@pytest.mark.parametrize("case", sorted(set(CASES) - {"adaptive_kl"}))
@pytest.mark.parametrize(("temperature", "mode"), [(1.0, "exact"), (0.5, "conditional")])
def test_gradcheck(case: str, temperature: float, mode: TemperatureMode) -> None:
    teacher, student = (each[:1, :2, :7] for each in _pair(7))
    targets = _targets(teacher, 3, temperature)
    assert torch.autograd.gradcheck(
        lambda logits: _loss(case, logits, targets, temperature, mode), (student.clone().requires_grad_(),)
    )


def test_the_head_of_adaptive_kl_is_made_of_kept_tokens() -> None:
    """Kept 0.4, 0.15 and 0.05, tail 0.4, mu 0.56: the head is the first two tokens, never the tail."""
    p = torch.tensor([[[0.4, 0.15, 0.05, 0.4]]], dtype=torch.float64)
    q = torch.tensor([[[0.2, 0.25, 0.15, 0.4]]], dtype=torch.float64)
    head, rest = 0.2 + 0.1, 0.1
    expected = (head * _kl(p, q) + rest * _kl(q, p)) / (head + rest)
    torch.testing.assert_close(adaptive_kl_divergence(p.log(), q.log(), mu=0.56), expected)


def test_the_shares_of_adaptive_kl_are_constants() -> None:
    teacher, student = _pair(7)
    student.requires_grad_()
    p, q = teacher.softmax(-1), student.softmax(-1)
    forward, reverse = _kl(p, q), _kl(q, p)
    share = ((_adaptive(p, q, 0.5) - reverse) / (forward - reverse)).detach()
    expected = torch.autograd.grad(
        (share * forward + (1 - share) * reverse).sum(), student, retain_graph=True
    )
    found = torch.autograd.grad(_loss("adaptive_kl", student, _targets(teacher, V)), student)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("case", CASES)
def test_edges_are_finite(case: str) -> None:
    teacher, student = (each.float()[:1] for each in _pair(9))
    one_hot = torch.full((1, T, V), -1e4).index_fill(-1, torch.tensor([3]), 1e4)
    forbidden = torch.full((1, T, V), -torch.inf).index_fill(-1, torch.tensor([3]), 0.0)
    sharp = SparseTargets(
        token_ids=torch.full((1, T, 1), 3),
        logprobs=torch.zeros(1, T, 1),
        log_tail=torch.full((1, T), -torch.inf),
    )
    for logits in (student, one_hot, forbidden, student * 1e4):
        for targets in (
            *(targets_of(teacher, K), targets_of(teacher, V), targets_of(one_hot, K), sharp),
            *(targets_of(teacher, K, pads=2), DenseTargets(logprobs=one_hot.log_softmax(-1))),
        ):
            leaf = logits.clone().requires_grad_()
            loss = _loss(case, leaf, targets)
            (gradient,) = torch.autograd.grad(loss, leaf)
            assert math.isfinite(loss.item())
            assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("case", CASES)
def test_masking_equals_deleting(case: str) -> None:
    teacher, student = _pair(11)
    student[:, 1] = torch.nan
    name, parameters, _ = CASES[case]
    weights = torch.tensor([[1.0, 0, 1, 1]] * B, dtype=torch.float64)
    keep = [0, 2, 3]
    leaf = student.clone().requires_grad_()
    masked = distillation_loss(name, leaf, _targets(teacher, K), weights, parameters=parameters)
    (gradient,) = torch.autograd.grad(masked.loss_sum, leaf)
    kept = leaf.detach()[:, keep].requires_grad_()
    deleted = distillation_loss(
        name, kept, _targets(teacher[:, keep], K), weights[:, keep], parameters=parameters
    )
    (expected,) = torch.autograd.grad(deleted.loss_sum, kept)
    torch.testing.assert_close(masked, deleted)
    torch.testing.assert_close(gradient[:, keep], expected)
    assert (gradient[:, 1] == 0).all()


def test_limits_are_continuous_where_they_are_said_to_be() -> None:
    teacher, student = _pair(13)
    dense = DenseTargets(logprobs=teacher.log_softmax(-1))

    def value(name: str, **parameters: float) -> float:
        return distillation_loss(name, student, dense, ONES, parameters=parameters).loss_sum.item()

    forward, reverse = value("forward_kl"), value("reverse_kl")
    assert value("jsd_normalised", beta=1e-6) == pytest.approx(forward, rel=1e-3)
    assert value("jsd_normalised", beta=1 - 1e-6) == pytest.approx(reverse, rel=1e-3)
    assert value("jsd", beta=1e-6) < 1e-3 * value("jsd", beta=0.0)
    assert value("alpha_beta", alpha=1 - 1e-6, beta=1e-6) == pytest.approx(forward, rel=1e-3)
    assert value("alpha_beta", alpha=1e-6, beta=1 - 1e-6) == pytest.approx(reverse, rel=1e-3)
    # At other sums the limits have the factors 1 / alpha^2 and 1 / beta^2.
    for alpha, beta in ((0.7, 0.0), (0.0, 0.7)):
        near = value("alpha_beta", alpha=alpha or 1e-6, beta=beta or 1e-6)
        assert value("alpha_beta", alpha=alpha, beta=beta) == pytest.approx(near, rel=1e-3)


def test_mse_is_what_a_hot_kl_goes_to() -> None:
    """T^2 KL at high T goes to half the mean square of centred logits over V (Hinton et al. 1503.02531)."""
    teacher, student = _pair(15)
    dense = DenseTargets(logprobs=teacher.log_softmax(-1))
    hot = _loss("forward_kl", student, dense, 2000.0)
    torch.testing.assert_close(hot, _loss("mse", student, dense) / 2, rtol=1e-2, atol=0)


# Published formulas, written anew; each is compared on the same tensors, over the whole vocabulary.


def _trl_generalized_jsd(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """trl 1.16, GKDTrainer.generalized_jsd_loss with a sum in place of its mean; it has no factor T^2."""
    log_q, log_p = (x / temperature for x in (student, teacher))
    log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
    if beta == 0:
        return functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if beta == 1:
        return functional.kl_div(log_p, log_q, reduction="sum", log_target=True)
    log_m = torch.stack([log_q + math.log1p(-beta), log_p + math.log(beta)]).logsumexp(0)
    of_teacher = functional.kl_div(log_m, log_p, reduction="sum", log_target=True)
    of_student = functional.kl_div(log_m, log_q, reduction="sum", log_target=True)
    return beta * of_teacher + (1 - beta) * of_student


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_jsd_is_that_of_trl(beta: float, temperature: float) -> None:
    teacher, student = _pair(17)
    ours = distillation_loss(
        "jsd",
        student,
        _targets(teacher, V, temperature),
        ONES,
        parameters={"beta": beta},
        temperature=temperature,
    ).loss_sum
    theirs = _trl_generalized_jsd(student, teacher, beta, temperature)
    torch.testing.assert_close(ours, temperature**2 * theirs)


@pytest.mark.parametrize("name", ["skew_kl", "skew_reverse_kl"])
def test_skew_divergences_have_the_gradients_of_distillm(name: str) -> None:
    """distillm/losses.py: skewed_forward_kl and skewed_reverse_kl, whose `lam` 0.1 is our alpha.

    The forward one is -sum p log(lam p + (1 - lam) q), without sum p log p: the gradients agree, the values differ by
    the teacher's entropy. The reverse one is whole.
    """
    teacher, student = _pair(19)
    student.requires_grad_()
    p, q, lam = teacher.softmax(-1), student.softmax(-1), 0.1
    if name == "skew_kl":
        theirs = -(p * (lam * p + (1 - lam) * q).log()).sum()
        constant = (p * p.log()).sum()
    else:
        theirs = -(q * ((1 - lam) * p + lam * q).log() - q * q.log()).sum()
        constant = torch.zeros((), dtype=torch.float64)
    ours = distillation_loss(name, student, _targets(teacher, V), ONES, parameters={"alpha": lam}).loss_sum
    torch.testing.assert_close(ours, theirs + constant)
    torch.testing.assert_close(torch.autograd.grad(ours, student), torch.autograd.grad(theirs, student))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_divergences_are_the_objectives_of_f_distill(name: str) -> None:
    """f-distill (Wen et al., ACL 2023), its four step-wise objectives; its JS has weight 1/2 and its `beta` is the student's."""
    teacher, student = _pair(21)
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = (p + q) / 2
    theirs = {
        "forward_kl": -(p * (q / p).log()).sum(),
        "reverse_kl": (q * (q / p).log()).sum(),
        "jsd": 0.5 * (p * (p / m).log()).sum() + 0.5 * (q * (q / m).log()).sum(),
        "tvd": 0.5 * (q - p).abs().sum(),
    }[name]
    parameters = {"beta": 0.5} if name == "jsd" else {}
    ours = distillation_loss(name, student, _targets(teacher, V), ONES, parameters=parameters).loss_sum
    torch.testing.assert_close(ours, theirs)
