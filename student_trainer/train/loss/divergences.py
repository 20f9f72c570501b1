"""Divergences per position between two bucketed distributions: pure functions of log-probabilities, without masks or reduction.

To add one, write a function of this signature and name it in DIVERGENCES. Axes: B sequences, T positions, S buckets,
the last of which is the tail. p is the teacher, q the student. A bucket that is empty is -inf on both sides, or only
in the teacher; no term may become 0 x inf.

Conventions differ between publications; here `beta` and `alpha` weight the teacher as the formula of each function says.
TRL, Liger and the GKD paper agree with `jsd`; DistiLLM's and ABKD's `lam` and f-distill's `beta` weight the student.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stillhouse.student_trainer.train.loss import tail_draws

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(teacher_logprobs_BTS, student_logprobs_BTS) -> loss_BT, in nats except `tvd` (a probability) and `mse`."""

NO_MASS_LOGPROB = -1e4
"""Finite stand-in for the log-probability of a bucket without mass; its exp is 0."""
TAIL_FLOOR_LOGPROB = math.log(1e-6)
"""Floor of the teacher's tail log-probability in reverse KL, which would otherwise grow without bound."""


def forward_kl_divergence(
    teacher_logprobs: Float[Tensor, "B T S"], student_logprobs: Float[Tensor, "B T S"]
) -> Float[Tensor, "B T"]:
    """KL(teacher || student) = sum_s p_s (log p_s - log q_s), >= 0; 0 iff both are equal."""
    both = _finite(teacher_logprobs, student_logprobs)
    return both.sum(both.log_p.exp() * (both.log_p - both.log_q))


def reverse_kl_divergence(
    teacher_logprobs: Float[Tensor, "B T S"], student_logprobs: Float[Tensor, "B T S"]
) -> Float[Tensor, "B T"]:
    """KL(student || teacher) = sum_s q_s (log q_s - log p_s), with the teacher's tail at TAIL_FLOOR_LOGPROB at least."""
    both = _finite(floor_tail(teacher_logprobs), student_logprobs)
    return both.sum(both.log_q.exp() * (both.log_q - both.log_p))


def jsd_divergence(
    teacher_logprobs: Float[Tensor, "B T S"], student_logprobs: Float[Tensor, "B T S"], *, beta: float
) -> Float[Tensor, "B T"]:
    """Generalised Jensen-Shannon divergence beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q.

    Follows TRL and Agarwal et al. (2306.13649): beta 0 and 1 are special cases, forward and reverse KL, although the
    formula goes to 0 there. The family is therefore not continuous at its ends; `jsd_normalised` is.
    """
    if beta == 0:
        return forward_kl_divergence(teacher_logprobs, student_logprobs)
    if beta == 1:
        return reverse_kl_divergence(teacher_logprobs, student_logprobs)
    both = _finite(teacher_logprobs, student_logprobs)
    log_m = torch.logaddexp(both.log_p + math.log(beta), both.log_q + math.log1p(-beta))
    teacher_terms = both.log_p.exp() * (both.log_p - log_m)
    student_terms = both.log_q.exp() * (both.log_q - log_m)
    return both.sum(beta * teacher_terms + (1 - beta) * student_terms)


def jsd_normalised_divergence(
    teacher_logprobs: Float[Tensor, "B T S"], student_logprobs: Float[Tensor, "B T S"], *, beta: float
) -> Float[Tensor, "B T"]:
    """`jsd` / (beta (1 - beta)): goes to forward KL with beta -> 0 and to reverse KL with beta -> 1."""
    scale = 1.0 if beta in (0, 1) else 1 / (beta * (1 - beta))
    return scale * jsd_divergence(teacher_logprobs, student_logprobs, beta=beta)


def total_variation(
    teacher_logprobs: Float[Tensor, "B T S"], student_logprobs: Float[Tensor, "B T S"]
) -> Float[Tensor, "B T"]:
    """sum_s |p_s - q_s| / 2, in [0, 1]; its gradient at a tie is 0."""
    both = _finite(teacher_logprobs, student_logprobs)
    return both.sum((both.log_p.exp() - both.log_q.exp()).abs() / 2)


def skew_kl_divergence(
    teacher_logprobs: Float[Tensor, "B T S"], student_logprobs: Float[Tensor, "B T S"], *, alpha: float
) -> Float[Tensor, "B T"]:
    """KL(p || alpha p + (1 - alpha) q), DistiLLM's skew KL (2402.03898); alpha = 0 is forward KL.

    DistiLLM's code leaves out sum p log p, which no gradient sees, so its values differ by the teacher's entropy.
    """
    if alpha == 0:
        return forward_kl_divergence(teacher_logprobs, student_logprobs)
    both = _finite(teacher_logprobs, student_logprobs)
    log_m = torch.logaddexp(both.log_p + math.log(alpha), both.log_q + math.log1p(-alpha))
    return both.sum(both.log_p.exp() * (both.log_p - log_m))


def skew_reverse_kl_divergence(
    teacher_logprobs: Float[Tensor, "B T S"], student_logprobs: Float[Tensor, "B T S"], *, alpha: float
) -> Float[Tensor, "B T"]:
    """KL(q || (1 - alpha) p + alpha q), DistiLLM's skew reverse KL; alpha = 0 is reverse KL."""
    if alpha == 0:
        return reverse_kl_divergence(teacher_logprobs, student_logprobs)
    both = _finite(teacher_logprobs, student_logprobs)
    log_m = torch.logaddexp(both.log_p + math.log1p(-alpha), both.log_q + math.log(alpha))
    return both.sum(both.log_q.exp() * (both.log_q - log_m))


def alpha_beta_divergence(
    teacher_logprobs: Float[Tensor, "B T S"],
    student_logprobs: Float[Tensor, "B T S"],
    *,
    alpha: float,
    beta: float,
) -> Float[Tensor, "B T"]:
    """-1/(ab) sum_s [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], with its limits at a = 0 and b = 0.

    (1, 0) is forward KL, (0, 1) reverse KL. Cichocki et al. (2011), Wang et al. (2505.04560). Only for a + b = 1 it is
    an f-divergence, and so a lower bound on the tail bucket. Raises ValueError unless a, b >= 0 and a + b > 0.
    """
    if alpha < 0 or beta < 0 or alpha + beta == 0:
        raise ValueError(
            f"alpha_beta is defined for alpha, beta >= 0 that are not both 0, not ({alpha}, {beta})"
        )
    both = _finite(teacher_logprobs, student_logprobs)
    if beta == 0:
        scaled_p, scaled_q = alpha * both.log_p, alpha * both.log_q
        return both.sum(scaled_p.exp() * (scaled_p - scaled_q) - scaled_p.exp() + scaled_q.exp()) / alpha**2
    if alpha == 0:
        scaled_p, scaled_q = beta * floor_tail(both.log_p), beta * both.log_q
        return both.sum(scaled_q.exp() * (scaled_q - scaled_p) - scaled_q.exp() + scaled_p.exp()) / beta**2
    total = alpha + beta
    product = (alpha * both.log_p + beta * both.log_q).exp()
    powers = alpha / total * (total * both.log_p).exp() + beta / total * (total * both.log_q).exp()
    return both.sum(powers - product) / (alpha * beta)


def adaptive_kl_divergence(
    teacher_logprobs: Float[Tensor, "B T S"], student_logprobs: Float[Tensor, "B T S"], *, mu: float
) -> Float[Tensor, "B T"]:
    """Forward and reverse KL, weighted by the share of |p - q| in the teacher's head and in the rest.

    The head is the longest prefix of the teacher's tokens by falling probability with mass at most `mu`, at least one
    token; it never contains the tail bucket. g = sum |p - q| over each part, without gradient; the loss is
    (g_head KL(p || q) + g_rest KL(q || p)) / (g_head + g_rest). Wu et al. (2404.02657).
    """
    both = _finite(teacher_logprobs.detach(), student_logprobs.detach())
    p = both.log_p.exp()
    gaps = (p - both.log_q.exp()).abs().masked_fill(both.empty, 0.0)
    sorted_p, order = p[..., :-1].sort(dim=-1, descending=True, stable=True)
    in_head = sorted_p.cumsum(-1) <= mu
    in_head[..., :1] = True
    head = gaps[..., :-1].gather(-1, order).masked_fill(~in_head, 0.0).sum(-1)
    total = gaps.sum(-1)
    share = torch.where(total > 0, head / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)
    forward = forward_kl_divergence(teacher_logprobs, student_logprobs)
    return share * forward + (1 - share) * reverse_kl_divergence(teacher_logprobs, student_logprobs)


def centred_mse(
    teacher_logprobs: Float[Tensor, "B T S"], student_logprobs: Float[Tensor, "B T S"]
) -> Float[Tensor, "B T"]:
    """Mean over the kept tokens of ((log q_i - mean log q) - (log p_i - mean log p))^2.

    Log-probabilities fix logits up to a constant, which centring removes, so this is the error of the logits. The
    tail bucket has no logit and is left out. The temperature cancels against its square as factor.
    """
    both = _finite(teacher_logprobs, student_logprobs)
    known = ~(both.empty | torch.isneginf(teacher_logprobs))[..., :-1]
    count = known.sum(-1, keepdim=True).clamp(min=1)
    difference = (both.log_q - both.log_p)[..., :-1].masked_fill(~known, 0.0)
    centred = (difference - difference.sum(-1, keepdim=True) / count).masked_fill(~known, 0.0)
    return centred.square().sum(-1) / count.squeeze(-1)


def floor_tail(teacher_logprobs: Float[Tensor, "B T S"]) -> Float[Tensor, "B T S"]:
    """Raises the teacher's tail to at least TAIL_FLOOR_LOGPROB."""
    kept, tail = teacher_logprobs[..., :-1], teacher_logprobs[..., -1:]
    return torch.cat([kept, tail.clamp(min=TAIL_FLOOR_LOGPROB)], dim=-1)


class _FinitePair(NamedTuple):
    """Two bucketed distributions without infinities."""

    log_p: Float[Tensor, "B T S"]
    log_q: Float[Tensor, "B T S"]
    empty: Bool[Tensor, "B T S"]
    """True for buckets that neither side has."""

    def sum(self, terms: Tensor) -> Tensor:
        """Sums over the buckets that exist."""
        return terms.masked_fill(self.empty, 0.0).sum(-1)


def _finite(teacher_logprobs: Tensor, student_logprobs: Tensor) -> _FinitePair:
    empty = torch.isneginf(student_logprobs)
    return _FinitePair(
        log_p=teacher_logprobs.masked_fill(torch.isneginf(teacher_logprobs), NO_MASS_LOGPROB),
        log_q=student_logprobs.masked_fill(empty, NO_MASS_LOGPROB),
        empty=empty,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DivergenceSpec:
    """A divergence's formula and its mathematical properties."""

    function: Callable[..., Tensor]
    """(teacher_logprobs, student_logprobs, **parameters) -> loss per position."""
    is_f_divergence: bool = True
    """Never grows when buckets are merged, so the tail bucket gives a lower bound of the divergence over the vocabulary."""
    linear_in_teacher: bool = False
    """Linear in the teacher's probabilities up to a constant: sampled targets give an unbiased gradient."""
    generator: Callable[..., Tensor] | None = None
    """f(r) - c r as a function of (log r, **parameters), for estimates from draws (tail_draws.py); None if it has none."""

    def bind(self, parameters: Mapping[str, float]) -> Divergence:
        """Returns the divergence with its parameters bound."""
        return partial(self.function, **parameters) if parameters else self.function


DIVERGENCES: Mapping[str, DivergenceSpec] = {
    "forward_kl": DivergenceSpec(
        function=forward_kl_divergence, linear_in_teacher=True, generator=tail_draws.forward_kl_generator
    ),
    "reverse_kl": DivergenceSpec(function=reverse_kl_divergence),
    "jsd": DivergenceSpec(function=jsd_divergence, generator=tail_draws.jsd_generator),
    "jsd_normalised": DivergenceSpec(
        function=jsd_normalised_divergence, generator=tail_draws.jsd_normalised_generator
    ),
    "tvd": DivergenceSpec(function=total_variation, generator=tail_draws.total_variation_generator),
    "skew_kl": DivergenceSpec(function=skew_kl_divergence, generator=tail_draws.skew_kl_generator),
    "skew_reverse_kl": DivergenceSpec(
        function=skew_reverse_kl_divergence, generator=tail_draws.skew_reverse_kl_generator
    ),
    "alpha_beta": DivergenceSpec(function=alpha_beta_divergence, generator=tail_draws.alpha_beta_generator),
    "adaptive_kl": DivergenceSpec(function=adaptive_kl_divergence, is_f_divergence=False),
    "mse": DivergenceSpec(function=centred_mse, is_f_divergence=False),
}
"""Divergences by their names in a run file; parameters and defaults are in student_trainer/config/schema.py."""
