"""Unbiased estimates of f-divergences over the tail, from tokens that the teacher drew there.

An f-divergence is sum_v p_v f(r_v) with r = q / p. Over the kept tokens it is summed exactly, and over the tail it is
P f(Q / P), which the tail bucket gives exactly, plus P (E[f(r)] - f(Q / P)) with v drawn from the teacher's tail: this
second part is estimated, by the mean over draws. It is linear in the draws, so values and gradients are unbiased.

E[r] = Q / P is known exactly, so f(r) - c r may stand for f(r) with any c. With c = lim f(r) / r the draws' gradients,
r (f'(r) - c), are bounded, where r itself is not: a token that the student likes and the teacher hardly ever draws
would else ruin the estimate. This limit is infinite for reverse KL, which therefore has no generator here, and
adaptive KL and the error of logits are no f-divergences. The generators below are f(r) - c r as functions of log r.

At higher temperatures r is near 1 for most tokens, and f(r) near a multiple k r beside its own: a control variate, k (r - Q / P),
leaves a fraction of the variance. Each draw's k comes from other draws of its position, so that it and r are nearly independent.

Reverse KL, sum_v q_v log r_v, weighs tokens by the student, and is estimated from draws of the student, of its own texts: over the
tail it is Q log(Q / P), which the bucket gives, plus the mean over draws of q_v / s_v (log r_v - log(Q / P)), with s the
distribution that they were drawn from. Values and gradients are unbiased for any s, also that of an earlier student.
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
MIN_CONTROLLED_DRAWS = 32
"""Fewest distinct draws of a position that tell the factor of its control variate."""
MAX_CONTROLLED_RATIO = 40.0
"""Bound of log r in a control variate, whose square float32 has to hold."""
RIDGE, MAX_SQUARE_SHARE = 2.0, 0.5
"""Times the largest square that is added to the sum of squares in a control variate, and the most of the sum that it may be: one
large r says nothing of the others."""
MAX_LOG_ERROR = math.log(1.3)
"""Most by which the draws that tell a control variate's factor may miss log Q / P, which is known."""


def tail_divergence(
    generator: Generator, drawn: DrawnTail, *, controlled: bool = False
) -> Float[Tensor, "B T"]:
    """Estimates P (E[f(r)] - f(Q / P)) of each position; 0 where student and teacher are equal, or nothing is drawn.

    With `controlled`, k r stands for c r, with k from the position's other draws.
    """
    mass = drawn.log_tail.exp().squeeze(-1)
    deviation = generator(drawn.log_ratios) - generator(drawn.log_tail_ratio)
    if controlled:
        ratios, mean = (
            each.clamp(max=MAX_CONTROLLED_RATIO).exp() for each in (drawn.log_ratios, drawn.log_tail_ratio)
        )
        deviation = deviation - _slopes(generator, drawn) * (ratios - mean)
    return mass * (drawn.shares * deviation).sum(-1)


def student_tail_divergence(drawn: DrawnTail, *, floor: float) -> Float[Tensor, "B T"]:
    """Estimates Q (E_q[log r] - log(Q / P)) from draws of the student, whose shares are over the probabilities of drawing them.

    `floor` is the least log P, as in the bucket's own term; 0 where nothing is drawn.
    """
    lifted = (floor - drawn.log_tail).clamp(min=0.0).masked_fill(torch.isneginf(drawn.log_tail), 0.0)
    log_tail_ratio = drawn.log_tail_ratio - lifted
    weights = drawn.shares * drawn.student_logprobs.exp()
    # Over the whole tail the gradients of the ratios, weighted by q, add up to 0: without them a student that equals its teacher
    # has the gradient 0 for any draws.
    return (weights * (drawn.log_ratios - log_tail_ratio).detach()).sum(-1)


def _slopes(generator: Generator, drawn: DrawnTail) -> Float[Tensor, "B T K"]:
    """The k of each draw: that with the least squares of h - k r, h = r (f'(r) - c), over every second distinct draw of the position,
    those that the draw itself is not among; 0 where there are few, or where they tell too little.

    Where the student likes tokens far more than the teacher, draws that hit none of them, or too many, estimate Q / P wrongly, and
    a single r settles k: it would then add noise instead of removing it.
    """
    with torch.enable_grad():
        log_ratios = drawn.log_ratios.detach().clamp(max=MAX_CONTROLLED_RATIO).requires_grad_()
        (slopes,) = torch.autograd.grad(generator(log_ratios).sum(), log_ratios)
    counts = drawn.shares > 0
    ratios, ordinals = log_ratios.detach().exp(), counts.cumsum(-1)
    odd = ordinals % 2 == 1
    tail_ratio = drawn.log_tail_ratio.detach()

    def factor(half: Tensor) -> Tensor:
        own, shares = ratios.masked_fill(~half, 0.0), drawn.shares.masked_fill(~half, 0.0)
        squares = own.square()
        total, largest = squares.sum(-1, keepdim=True), squares.amax(-1, keepdim=True)
        slope = (own * slopes).sum(-1, keepdim=True) / (total + RIDGE * largest).clamp(
            min=torch.finfo(own.dtype).tiny
        )
        estimate = (shares * own).sum(-1, keepdim=True).log() - shares.sum(-1, keepdim=True).log()
        tells = ((estimate - tail_ratio).abs() <= MAX_LOG_ERROR) & (largest <= MAX_SQUARE_SHARE * total)
        return slope.masked_fill(~tells, 0.0)

    many = ordinals[..., -1:] >= MIN_CONTROLLED_DRAWS
    return torch.where(odd, factor(counts & ~odd), factor(counts & odd)).masked_fill(~many, 0.0)


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
