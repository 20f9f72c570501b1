"""Reverse KL by policy gradient on tokens sampled from the student; needs only these tokens' log-probabilities from the teacher.

With y sampled from mu, an earlier student, and q the current student: A = log p(y) - log q(y), a constant, and
rho = q(y) / mu(y), truncated. The gradient is that of -rho (A - b) log q(y), whose expectation over y ~ mu is the gradient
of KL(q || p) at this position for every b that does not depend on y, as long as nothing is truncated or dropped (the states
are held fixed; the k1 estimate used directly as a loss has expectation zero). Axes: B sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from stillhouse.student_trainer.train.loss.reduction import reduce

MAX_PROBABILITY_LOST = 0.2
"""Tokens whose probability fell by more than this since they were sampled are dropped: they are too off-policy."""
MIN_TEACHER_LOGPROB = -30.0
"""Floor of the teacher's log-probabilities, which keeps every gradient finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledTokens:
    """Log-probabilities and baselines of tokens sampled from an earlier student."""

    teacher_logprobs: Float[Tensor, "B T"]
    """log p(y), natural, at temperature 1."""
    behaviour_logprobs: Float[Tensor, "B T"]
    """log mu(y), under the distribution that y was actually sampled from."""
    max_importance_weight: float
    """Truncation limit of rho, > 0."""
    baseline: Float[Tensor, "B T"] | None = None
    """b, from independently sampled texts; None means 0."""

    def rows(self, rows: slice) -> SampledTokens:
        """Selects positions of every sequence, as views."""
        return SampledTokens(
            teacher_logprobs=self.teacher_logprobs[:, rows],
            behaviour_logprobs=self.behaviour_logprobs[:, rows],
            max_importance_weight=self.max_importance_weight,
            baseline=None if self.baseline is None else self.baseline[:, rows],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportanceWeights:
    """Importance weights of sampled tokens, without gradient."""

    exact: Float[Tensor, "B T"]
    """rho = q(y) / mu(y)."""
    used: Float[Tensor, "B T"]
    """rho, truncated, and 0 for dropped tokens."""
    dropped: Bool[Tensor, "B T"]
    """True for tokens that lost more than MAX_PROBABILITY_LOST."""


def importance_weights(student_logprobs: Float[Tensor, "B T"], sampled: SampledTokens) -> ImportanceWeights:
    """Returns the importance weight of each token; `student_logprobs` are log q(y)."""
    now, then = student_logprobs.detach(), sampled.behaviour_logprobs
    exact = (now - then).exp()
    dropped = now.exp() - then.exp() < -MAX_PROBABILITY_LOST
    used = exact.clamp(max=sampled.max_importance_weight).masked_fill(dropped, 0.0)
    return ImportanceWeights(exact=exact, used=used, dropped=dropped)


def policy_gradient(student_logprobs: Float[Tensor, "B T"], sampled: SampledTokens) -> Float[Tensor, "B T"]:
    """Returns the loss of each position: value rho (log q - log p), gradient -rho (A - b) grad log q."""
    weights = importance_weights(student_logprobs, sampled).used
    now = student_logprobs.detach()
    advantage = sampled.teacher_logprobs.clamp(min=MIN_TEACHER_LOGPROB) - now
    compared = advantage if sampled.baseline is None else advantage - sampled.baseline
    # The second term is 0 in value and carries the gradient.
    return -weights * (advantage + compared * (student_logprobs - now))


def drift(
    student_logprobs: Float[Tensor, "B T"], sampled: SampledTokens, weights: Float[Tensor, "B T"]
) -> Mapping[str, Tensor]:
    """Returns off-policy metrics: name to scalar sum over tokens, without gradient.

    mismatch_kl is the estimate rho - 1 - log rho of KL(mu || q), >= 0 for every token.
    """
    weights_of_tokens = importance_weights(student_logprobs, sampled)
    truncated = weights_of_tokens.exact > sampled.max_importance_weight
    values = {
        "importance_weight": weights_of_tokens.exact,
        "mismatch_kl": weights_of_tokens.exact - 1 - (student_logprobs.detach() - sampled.behaviour_logprobs),
        "importance_truncated": truncated.float(),
        "importance_dropped": weights_of_tokens.dropped.float(),
        "rollout_logprob": sampled.behaviour_logprobs,
        "rollout_teacher_logprob": sampled.teacher_logprobs,
    }
    return {name: reduce(value, weights).loss_sum for name, value in values.items()}
