"""Gradient of a divergence over the complete vocabulary, for students of full targets, in a few passes over blocks that stay in
the processor's cache.

A divergence is sum_v p_v f(r_v) with r = q / p; with u = q f'(r) its gradient by a logit at temperature T is, times T²,
T (u - q sum u). The product's own loss gives the same by autograd, in four times the time.

Axes: N positions, H hidden units, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillhouse.student_trainer.config.schema import LossConfig

BLOCK_LOGITS = 2**17
MAX_LOG_RATIO = 80.0
"""Bound of log p / q, whose exponential float32 has to hold."""


def full_gradient_loss(hidden_NH: Tensor, weight_VH: Tensor, logprobs_NV: Tensor, loss: LossConfig) -> Tensor:
    """A sum whose gradients are those of the loss's one term; its value, which no step needs, is not computed.

    `logprobs_NV` are the teacher's at the loss's temperature.
    """
    total: Tensor = _FullGradient.apply(hidden_NH, weight_VH, logprobs_NV, loss)  # type: ignore[no-untyped-call]
    return total


def has_full_gradient(loss: LossConfig) -> bool:
    """True if `full_gradient_loss` knows the loss."""
    return len(loss.terms) == 1 and loss.terms[0].divergence in _WEIGHTED_SLOPES and loss.hard_weight == 0


class _FullGradient(torch.autograd.Function):
    """(hidden, weight) -> 0, with gradients that are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, logprobs: Tensor, loss: LossConfig) -> Tensor:
        term, temperature = loss.terms[0], loss.temperature
        slopes, rows = _WEIGHTED_SLOPES[term.divergence], max(1, BLOCK_LOGITS // weight.shape[0])
        hidden_sum, weight_sum = torch.empty_like(hidden), torch.zeros_like(weight)
        for first in range(0, len(hidden), rows):
            block = hidden[first : first + rows]
            log_p = logprobs[first : first + rows]
            logits = block @ weight.T
            if temperature != 1:
                logits.div_(temperature)
            q = torch.softmax(logits, -1)
            log_q = logits.sub_(logits.logsumexp(-1, keepdim=True))
            u = slopes(_At(log_p, log_q, q, term.parameters))
            gradient = q.mul_(u.sum(-1, keepdim=True)).sub_(u).mul_(-term.weight * temperature)
            hidden_sum[first : first + rows] = gradient @ weight
            weight_sum.addmm_(gradient.T, block)
        ctx.gradients = hidden_sum, weight_sum
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.gradients
        return hidden * upstream[0], weight * upstream[0], None, None


class _At(NamedTuple):
    """A block of both distributions, [N, V]; a slope may overwrite `log_q`."""

    log_p: Tensor
    log_q: Tensor
    q: Tensor
    parameters: Mapping[str, float]


def _forward_kl(at: _At) -> Tensor:
    return at.log_p.exp().neg_()


def _jsd(at: _At) -> Tensor:
    """(1 - beta) q (log q - log m)."""
    beta = at.parameters["beta"]
    inverse_ratio = torch.sub(at.log_p, at.log_q).clamp_(max=MAX_LOG_RATIO).exp_()
    return inverse_ratio.mul_(beta).add_(1 - beta).log_().mul_(at.q).mul_(beta - 1)


def _total_variation(at: _At) -> Tensor:
    return torch.sub(at.log_q, at.log_p).sign_().mul_(at.q).mul_(0.5)


def _skew_kl(at: _At) -> Tensor:
    """-(1 - alpha) q p / m, m = alpha p + (1 - alpha) q."""
    alpha = at.parameters["alpha"]
    ratio = torch.sub(at.log_q, at.log_p).clamp_(max=MAX_LOG_RATIO).exp_()
    return at.q.div(ratio.mul_(1 - alpha).add_(alpha)).mul_(alpha - 1)


def _skew_reverse_kl(at: _At) -> Tensor:
    """q (log q - log m - alpha q / m), m = (1 - alpha) p + alpha q."""
    alpha = at.parameters["alpha"]
    share = torch.sub(at.log_p, at.log_q).clamp_(max=MAX_LOG_RATIO).exp_().mul_(1 - alpha).add_(alpha)
    return share.log().add_(share.reciprocal_().mul_(alpha)).mul_(at.q).neg_()


def _alpha_beta(at: _At) -> Tensor:
    """-p^alpha q^beta / alpha, with alpha + beta = 1."""
    alpha, beta = at.parameters["alpha"], at.parameters["beta"]
    assert math.isclose(alpha + beta, 1), "checked with the run file"
    return at.log_q.mul_(beta).add_(at.log_p, alpha=alpha).exp_().mul_(-1 / alpha)


_WEIGHTED_SLOPES: Mapping[str, Callable[[_At], Tensor]] = {
    "forward_kl": _forward_kl,
    "jsd": _jsd,
    "tvd": _total_variation,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "alpha_beta": _alpha_beta,
}
"""u = q f'(r), up to a multiple of q, of each divergence."""
