"""Unbiased estimates of f-divergences over the tail, from tokens that the teacher drew there.

An f-divergence is sum_v p_v f(r_v) with r = q / p. Over the kept tokens it is summed exactly, and over the tail it is
P f(Q / P), which the tail bucket gives exactly, plus P (E[f(r)] - f(Q / P)) with v drawn from the teacher's tail: this
second part is estimated, by the mean over draws. It is linear in the draws, so values and gradients are unbiased.

E[r] = Q / P is known exactly, so f(r) - c r may stand for f(r) with any c. With c = lim f(r) / r the draws' gradients,
r (f'(r) - c), are bounded, where r itself is not: a token that the student likes and the teacher hardly ever draws
would else ruin the estimate. This limit is infinite for reverse KL, which therefore has no generator here, and
adaptive KL and the error of logits are no f-divergences. The generators below are f(r) - c r as functions of log r.
Axes as in sparse.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from stillhouse.student_trainer.train.loss.sparse import DrawnTail

Generator = Callable[[Tensor], Tensor]
"""log r -> f(r) - c r."""
MAX_LOG_RATIO = 60.0
"""Bound of log r in the factor r; beyond it r (f - c) is at its limit."""


def tail_divergence(generator: Generator, drawn: DrawnTail) -> Float[Tensor, "B T"]:
    """Estimates P (E[f(r)] - f(Q / P)) of each position; 0 where student and teacher are equal, or nothing is drawn."""
    mass = drawn.log_tail.exp().squeeze(-1)
    deviation = generator(drawn.log_ratios) - generator(drawn.log_tail_ratio)
    return mass * (drawn.shares * deviation).sum(-1)


def forward_kl_generator(log_ratio: Tensor) -> Tensor:
    """-log r: c = 0."""
    return -log_ratio


def jsd_generator(log_ratio: Tensor, *, beta: float) -> Tensor:
    """-beta log m - (1 - beta) r log(1 + beta / ((1 - beta) r)), m = beta + (1 - beta) r: c = -(1 - beta) log(1 - beta)."""
    if beta == 0:
        return forward_kl_generator(log_ratio)
    offset = math.log(beta) - math.log1p(-beta)
    log_m = torch.logaddexp(torch.full_like(log_ratio, math.log(beta)), log_ratio + math.log1p(-beta))
    return -beta * log_m - (1 - beta) * _scaled_softplus(log_ratio, offset)


def jsd_normalised_generator(log_ratio: Tensor, *, beta: float) -> Tensor:
    """That of jsd / (beta (1 - beta))."""
    scale = 1.0 if beta == 0 else 1 / (beta * (1 - beta))
    return scale * jsd_generator(log_ratio, beta=beta)


def total_variation_generator(log_ratio: Tensor) -> Tensor:
    """1/2 - min(r, 1): c = 1/2."""
    return 0.5 - log_ratio.clamp(max=0.0).exp()


def skew_kl_generator(log_ratio: Tensor, *, alpha: float) -> Tensor:
    """-log(alpha + (1 - alpha) r): c = 0."""
    if alpha == 0:
        return forward_kl_generator(log_ratio)
    return -torch.logaddexp(torch.full_like(log_ratio, math.log(alpha)), log_ratio + math.log1p(-alpha))


def skew_reverse_kl_generator(log_ratio: Tensor, *, alpha: float) -> Tensor:
    """-r log(1 + (1 - alpha) / (alpha r)): c = -log alpha."""
    return -_scaled_softplus(log_ratio, math.log1p(-alpha) - math.log(alpha))


def alpha_beta_generator(log_ratio: Tensor, *, alpha: float, beta: float) -> Tensor:
    """1 / beta - r^beta / (alpha beta) with alpha + beta = 1: c = 1 / alpha. For beta <= 1/2 its variance is bounded."""
    if beta == 0:
        return forward_kl_generator(log_ratio)
    return 1 / beta - (beta * log_ratio).exp() / (alpha * beta)


def _scaled_softplus(log_ratio: Tensor, offset: float) -> Tensor:
    """r log(1 + exp(offset) / r), which goes to exp(offset)."""
    bounded = log_ratio.clamp(max=MAX_LOG_RATIO)
    return bounded.exp() * functional.softplus(offset - bounded)
