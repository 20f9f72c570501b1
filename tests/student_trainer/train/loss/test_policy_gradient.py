"""The policy gradient against the analytic gradient of reverse KL, and its treatment of off-policy tokens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stillhouse.student_trainer.train.loss.policy_gradient import (
    MAX_PROBABILITY_LOST,
    MIN_TEACHER_LOGPROB,
    SampledTokens,
    drift,
    importance_weights,
    policy_gradient,
)

V = 12


def _distributions(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits with gradient, and log-probabilities of the teacher and of an earlier student, in float64."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(V, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(V, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)
    earlier = (logits.detach() + 0.1 * torch.randn(V, generator=generator, dtype=torch.float64)).log_softmax(
        -1
    )
    return logits, teacher, earlier


def _sampled(teacher: Tensor, behaviour: Tensor, cap: float = math.inf) -> SampledTokens:
    return SampledTokens(
        teacher_logprobs=teacher.unsqueeze(0),
        behaviour_logprobs=behaviour.unsqueeze(0),
        max_importance_weight=cap,
    )


@pytest.mark.parametrize("stale", [False, True])
def test_its_expectation_is_the_gradient_of_reverse_kl(*, stale: bool) -> None:
    logits, teacher, earlier = _distributions(0)
    logprobs = logits.log_softmax(-1)
    behaviour = earlier if stale else logprobs.detach()
    # Every token once, weighted by its sampling probability: the expectation without any noise.
    loss = (
        policy_gradient(logprobs.unsqueeze(0), _sampled(teacher, behaviour)).squeeze(0) * behaviour.exp()
    ).sum()
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    reverse_kl = (logprobs.exp() * (logprobs - teacher)).sum()
    (expected,) = torch.autograd.grad(reverse_kl, logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    assert loss.item() == pytest.approx(reverse_kl.item(), abs=1e-12)


def test_a_student_that_is_its_teacher_has_no_advantage() -> None:
    logits, _, _ = _distributions(1)
    logprobs = logits.log_softmax(-1)
    loss = policy_gradient(logprobs.unsqueeze(0), _sampled(logprobs.detach(), logprobs.detach())).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.item() == 0
    assert gradient.abs().max() == 0


def test_weights_are_truncated_and_lost_tokens_dropped() -> None:
    now = torch.tensor([[0.9, 0.1, 0.3, 0.05]]).log()
    then = torch.tensor([[0.3, 0.1, 0.3 + MAX_PROBABILITY_LOST + 0.01, 0.2]]).log()
    sampled = SampledTokens(
        teacher_logprobs=torch.zeros(1, 4), behaviour_logprobs=then, max_importance_weight=2.0
    )
    found = importance_weights(now, sampled)
    assert found.used[0].tolist() == pytest.approx([2.0, 1.0, 0.0, 0.25])
    assert found.dropped[0].tolist() == [False, False, True, False]
    sums = drift(now, sampled, torch.ones(1, 4))
    assert sums["importance_dropped"].item() == 1
    assert sums["importance_truncated"].item() == 1
    assert sums["mismatch_kl"].item() > 0


def test_a_truncated_weight_keeps_a_gradient() -> None:
    now = torch.tensor([[math.log(0.9)]], requires_grad=True)
    sampled = _sampled(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.1)]), cap=2.0)
    policy_gradient(now, sampled).sum().backward()
    assert now.grad is not None
    assert now.grad.item() == pytest.approx(2 * (math.log(0.9) - math.log(0.5)))


def test_a_token_that_the_teacher_excludes_stays_finite() -> None:
    now = torch.tensor([[math.log(0.5)]], requires_grad=True)
    loss = policy_gradient(now, _sampled(torch.tensor([-math.inf]), torch.tensor([math.log(0.5)]))).sum()
    assert loss.item() == pytest.approx(math.log(0.5) - MIN_TEACHER_LOGPROB)
