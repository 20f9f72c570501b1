"""What a run minimises: its divergences and its cross-entropy by weight, as a sum that the loop divides by the step's denominator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from student_trainer.config import LossConfig
from student_trainer.train.loss.policy_gradient import (
    SampledTokens,
    drift,
    policy_gradient,
    sampled_logprobs,
)
from student_trainer.train.loss.reduction import reduce
from student_trainer.train.loss.sparse import SparseTargets
from student_trainer.train.loss.temperature import TemperatureMode
from student_trainer.train.loss.terms import DIVERGENCES, cross_entropy, distillation_loss


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveSum:
    """An objective before it is divided by the sum of weights."""

    loss_sum: Tensor
    """Scalar, with the gradient."""
    parts: Mapping[str, Tensor]
    """Metric name to scalar sum, without gradient: "forward_kl", "cross_entropy", "teacher_mass"."""


def objective(
    student_logits: Float[Tensor, "B T V"],
    target_ids: Int64[Tensor, "B T"],
    targets: SparseTargets | None,
    weights: Float[Tensor, "B T"],
    config: LossConfig,
    *,
    vocab_size: int | None = None,
    sampled: SampledTokens | None = None,
) -> ObjectiveSum:
    """sum_i w_i D_i(teacher, student) + hard_weight x CE(text), each summed over tokens by `weights`.

    Cross-entropy is a metric even where its weight is 0. `targets` may be None only if every term's weight is 0, or its
    estimator "policy_gradient"; that one needs `sampled`, the tokens as an earlier student drew them.
    """
    parts: dict[str, Tensor] = {}
    with torch.set_grad_enabled(torch.is_grad_enabled() and config.hard_weight > 0):
        hard = cross_entropy(student_logits, target_ids, weights).loss_sum
    parts["cross_entropy"] = hard.detach()
    total = config.hard_weight * hard
    drawn: Tensor | None = None
    if sampled is not None:
        drawn = sampled_logprobs(student_logits, target_ids, weights)
        parts |= drift(drawn, sampled, weights)
    for term in config.terms:
        if term.weight == 0:
            continue
        if term.estimator == "policy_gradient":
            assert drawn is not None and sampled is not None, "checked with the run's contexts"  # noqa: PT018
            gradient = reduce(policy_gradient(drawn, sampled), weights).loss_sum
            parts["policy_gradient"] = gradient.detach()
            total = total + term.weight * gradient
            continue
        assert targets is not None, "a term has weight, but no teacher was asked"
        soft = distillation_loss(
            DIVERGENCES[term.divergence],
            student_logits,
            targets,
            weights,
            temperature=config.temperature,
            mode=cast("TemperatureMode", config.temperature_mode),
            vocab_size=vocab_size,
        ).loss_sum
        parts[term.divergence] = parts.get(term.divergence, torch.zeros_like(soft)) + soft.detach()
        total = total + term.weight * soft
    if targets is not None:
        parts["teacher_mass"] = reduce(-torch.expm1(targets.log_tail.float()), weights).loss_sum
    return ObjectiveSum(loss_sum=total, parts=parts)
