"""A run's objective: weighted divergences and cross-entropy, as a sum that the loop divides by the step's denominator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stillhouse.student_trainer.config.rules.loss import STUDENT_TAIL, is_controlled
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.train.loss.divergences import DIVERGENCES, TAIL_FLOOR_LOGPROB
from stillhouse.student_trainer.train.loss.policy_gradient import SampledTokens, drift, policy_gradient
from stillhouse.student_trainer.train.loss.readout import Readout, read_out
from stillhouse.student_trainer.train.loss.reduction import reduce
from stillhouse.student_trainer.train.loss.sparse import (
    BucketPair,
    SparseTargets,
    Targets,
    TeacherBuckets,
    bucket_pair,
    teacher_buckets,
)
from stillhouse.student_trainer.train.loss.tail_draws import student_tail_divergence, tail_divergence
from stillhouse.student_trainer.train.loss.temperature import (
    TemperatureMode,
    bucket_temperature,
    tempered_divergence,
)

TokenFactors: TypeAlias = Mapping[str, Tensor]
"""Token weighting to factors of each position's divergence, [B, T], with mean 1 over a step."""

CHARGE_TAIL = frozenset({"reverse_kl", "adaptive_kl"})
"""Divergences that charge the student's tail for the teacher's, with TAIL_FLOOR_LOGPROB as floor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectiveSum:
    """A weighted sum of losses and metrics, not yet divided by the sum of weights."""

    loss_sum: Tensor
    """Scalar, with the gradient."""
    parts: Mapping[str, Tensor]
    """Metric name to scalar sum, without gradient: each divergence, "cross_entropy", "teacher_mass", "tail_clamped"."""

    @staticmethod
    def total(parts: list[ObjectiveSum]) -> ObjectiveSum:
        """Sums chunks of positions."""
        names = parts[0].parts.keys()
        return ObjectiveSum(
            loss_sum=torch.stack([each.loss_sum for each in parts]).sum(),
            parts={name: torch.stack([each.parts[name] for each in parts]).sum() for name in names},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Positions:
    """Targets and weights of positions, without the student; one row, [1, N, ...], in a micro-batch."""

    target_ids: Int64[Tensor, "B T"]
    weights: Float[Tensor, "B T"]
    """0 for positions that do not count."""
    targets: Targets | None
    sampled: SampledTokens | None = None
    token_factors: TokenFactors = field(default_factory=dict)

    def rows(self, rows: slice) -> Positions:
        """Selects positions."""
        return Positions(
            target_ids=self.target_ids[:, rows],
            weights=self.weights[:, rows],
            targets=None if self.targets is None else self.targets.rows(rows),
            sampled=None if self.sampled is None else self.sampled.rows(rows),
            token_factors={name: factor[:, rows] for name, factor in self.token_factors.items()},
        )


def objective(
    student_logits: Float[Tensor, "B T V"],
    target_ids: Int64[Tensor, "B T"],
    targets: Targets | None,
    weights: Float[Tensor, "B T"],
    config: LossConfig,
    *,
    vocab_size: int | None = None,
    sampled: SampledTokens | None = None,
    token_factors: TokenFactors | None = None,
) -> ObjectiveSum:
    """Computes sum_i w_i D_i(teacher, student) + hard_weight x CE(text), each summed over tokens by `weights`.

    Cross-entropy is a metric even if its weight is 0. `targets` may be None only if every term's weight is 0 or its
    estimator is "policy_gradient", which needs `sampled`, the tokens sampled from an earlier student.
    """
    teacher = teacher_side(targets, config, num_logits=student_logits.shape[-1], vocab_size=vocab_size)
    readout = read_out(student_logits, target_ids, weights, teacher, temperature=readout_temperature(config))
    positions = Positions(
        target_ids=target_ids,
        weights=weights,
        targets=targets,
        sampled=sampled,
        token_factors=token_factors or {},
    )
    return objective_of(readout, teacher, positions, config)


def objective_of(
    readout: Readout, teacher: TeacherBuckets | None, positions: Positions, config: LossConfig
) -> ObjectiveSum:
    """Computes the objective from a readout of the logits at `positions`."""
    weights, sampled = positions.weights, positions.sampled
    text = objective_of_text(readout.targets, positions, config)
    total, parts = text.loss_sum, dict(text.parts)
    pair = None
    if teacher is not None and readout.buckets is not None:
        pair = bucket_pair(teacher, readout.buckets)
    for term in config.terms:
        if term.weight == 0:
            continue
        if term.estimator == "policy_gradient":
            assert sampled is not None, "checked with the run's contexts"
            name, loss = "policy_gradient", policy_gradient(readout.targets, sampled)
        else:
            assert pair is not None, "a term has weight, but the teacher was not queried"
            name, loss = term.divergence, _term(term, pair, config)
        if term.token_weighting != "uniform":  # noqa: S105 (tokens of text)
            loss = loss * positions.token_factors[term.token_weighting].to(loss.dtype)
        summed = reduce(loss, weights).loss_sum
        parts[name] = parts.get(name, torch.zeros_like(summed)) + summed.detach()
        total = total + term.weight * summed
        if name in CHARGE_TAIL and pair is not None:
            parts["tail_clamped"] = reduce(_clamped(pair), weights).loss_sum
    return ObjectiveSum(loss_sum=total, parts=parts)


def objective_of_text(
    target_logprobs: Float[Tensor, "B T"], positions: Positions, config: LossConfig
) -> ObjectiveSum:
    """Computes the cross-entropy's part of the objective, and the metrics that no term changes."""
    weights, sampled, targets = positions.weights, positions.sampled, positions.targets
    hard = reduce(-target_logprobs, weights).loss_sum
    parts = {"cross_entropy": hard.detach()}
    if sampled is not None:
        parts |= drift(target_logprobs, sampled, weights)
    if isinstance(targets, SparseTargets):
        parts["teacher_mass"] = reduce(-torch.expm1(targets.log_tail.float()), weights).loss_sum
    return ObjectiveSum(loss_sum=config.hard_weight * hard, parts=parts)


def teacher_side(
    targets: Targets | None, config: LossConfig, *, num_logits: int, vocab_size: int | None
) -> TeacherBuckets | None:
    """Returns the teacher's buckets at `readout_temperature`; None without targets."""
    if targets is None:
        return None
    return teacher_buckets(
        targets, num_logits=num_logits, vocab_size=vocab_size, temperature=readout_temperature(config)
    )


def readout_temperature(config: LossConfig) -> float:
    """Returns the temperature of `Readout.buckets`."""
    return bucket_temperature(config.temperature, cast("TemperatureMode", config.temperature_mode))


def _term(term: LossTermConfig, pair: BucketPair, config: LossConfig) -> Float[Tensor, "B T"]:
    """Computes one divergence at the run's temperature; with draws, of all tokens in expectation."""
    mode, spec = cast("TemperatureMode", config.temperature_mode), DIVERGENCES[term.divergence]
    loss = tempered_divergence(spec.bind(term.parameters), pair, temperature=config.temperature, mode=mode)
    if pair.drawn is not None and config.sparse_target == STUDENT_TAIL:
        return loss + student_tail_divergence(pair.drawn, floor=TAIL_FLOOR_LOGPROB)
    if pair.drawn is None or spec.generator is None:
        return loss
    return loss + config.temperature**2 * tail_divergence(
        partial(spec.generator, **term.parameters),
        pair.drawn,
        controlled=is_controlled(config),
    )


def _clamped(pair: BucketPair) -> Float[Tensor, "B T"]:
    """Returns 1 where the teacher's tail is below the floor and the student has a tail, else 0."""
    below = pair.teacher_logprobs[..., -1] < TAIL_FLOOR_LOGPROB
    return (below & ~torch.isneginf(pair.student_logprobs[..., -1])).to(pair.student_logprobs.dtype)
