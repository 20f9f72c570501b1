"""Approximate likelihood matching: compares the likelihoods of text chunks under teacher and student of different tokenizers.

A chunk is a stretch of bytes at whose two ends tokens of both end. The teacher gives it probability exp(p), p the sum of
its tokens' log-probabilities, and the student exp(q). At a temperature t, P = exp(p / t - EPSILON) and Q likewise; the
loss of the chunk is a divergence of (P, 1 - P) and (Q, 1 - Q). With forward KL that is Minixhofer et al. (2503.20083)
up to the teacher's entropy, which no gradient sees: d loss / d q = (Q - P) / (1 - Q) / t. Axes: N targets, C chunks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stillhouse.student_trainer.config.schema import LossConfig
from stillhouse.student_trainer.train.loss.divergences import DIVERGENCES
from stillhouse.student_trainer.train.loss.objective import ObjectiveSum
from stillhouse.student_trainer.train.loss.reduction import reduce

EPSILON = 1e-6
"""Keeps P and Q below 1, so that a certain chunk has a finite loss and gradient."""
LEAST_LOGPROB = -1e4
"""Floor of a chunk's log-probability, in nats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkTargets:
    """Chunks of N targets and the teacher's log-probabilities of them."""

    chunk_of: Int64[Tensor, "1 N"]
    """Index of each target's chunk, -1 for none."""
    teacher_logprobs: Float[Tensor, " C"]
    """Float64: natural log-probability of the chunk's text given all text before it, at temperature 1."""
    weights: Float[Tensor, " C"]
    """Float64: weight of each chunk in the sum."""


def chunk_objective(
    text_logprobs: Float[Tensor, "1 N"],
    weights: Float[Tensor, "1 N"],
    chunks: ChunkTargets,
    config: LossConfig,
) -> ObjectiveSum:
    """Computes sum_c w_c sum_i weight_i D_i(P_c, Q_c) + hard_weight x CE(text), before it is divided.

    `text_logprobs` are the student's, per target; `weights` are per target and apply to cross-entropy.
    Parts: "alm_" and the divergence, by chunk; "cross_entropy" and "aligned", the share of targets in a chunk, by target;
    "chunk_gap", |p - q| by chunk in nats.
    """
    hard = reduce(-text_logprobs, weights).loss_sum
    # A token that the student excludes must not spoil a loss without cross-entropy, even as 0 x inf.
    total = (
        config.hard_weight * hard.double() if config.hard_weight else torch.zeros_like(hard.detach()).double()
    )
    student = chunk_logprobs(text_logprobs, chunks)
    parts: dict[str, Tensor] = {
        "cross_entropy": hard.detach(),
        "aligned": reduce((chunks.chunk_of >= 0).to(weights.dtype), weights).loss_sum,
        "chunk_gap": ((student.detach() - chunks.teacher_logprobs).abs() * chunks.weights).sum(),
    }
    for term in config.terms:
        if term.weight == 0:
            continue
        loss = chunk_divergence(
            term.divergence,
            chunks.teacher_logprobs,
            student,
            temperature=config.chunk_temperature,
            parameters=term.parameters,
        )
        summed = (loss * chunks.weights).sum()
        key = f"alm_{term.divergence}"
        parts[key] = parts.get(key, torch.zeros_like(summed)) + summed.detach()
        total = total + term.weight * summed
    return ObjectiveSum(loss_sum=total, parts=parts)


def chunk_logprobs(text_logprobs: Float[Tensor, "1 N"], chunks: ChunkTargets) -> Float[Tensor, " C"]:
    """Returns the student's log-probability of each chunk, float64. Targets outside chunks are ignored and get no gradient."""
    chunk_of = chunks.chunk_of[0]
    inside = chunk_of >= 0
    summed = torch.zeros(
        len(chunks.teacher_logprobs), dtype=torch.float64, device=text_logprobs.device
    ).index_add(0, chunk_of[inside], text_logprobs[0][inside].double())
    return summed.clamp(min=LEAST_LOGPROB)


def chunk_divergence(
    name: str,
    teacher_logprobs: Float[Tensor, " C"],
    student_logprobs: Float[Tensor, " C"],
    *,
    temperature: float,
    parameters: Mapping[str, float] | None = None,
) -> Float[Tensor, " C"]:
    """Computes the f-divergence `name` of each chunk's (P, 1 - P) from (Q, 1 - Q), in nats, >= 0; 0 iff P = Q."""
    divergence = DIVERGENCES[name].bind(parameters or {})
    teacher = binary(teacher_logprobs.clamp(min=LEAST_LOGPROB), temperature)
    return divergence(teacher.unsqueeze(0), binary(student_logprobs, temperature).unsqueeze(0))[0]


def binary(logprobs: Float[Tensor, " C"], temperature: float) -> Float[Tensor, "C 2"]:
    """Returns log P and log (1 - P) with P = exp(logprobs / temperature - EPSILON); sums above 0 (rounding) count as 0."""
    log_p = logprobs.clamp(max=0.0) / temperature - EPSILON
    return torch.stack([log_p, log1mexp(log_p)], dim=-1)


def log1mexp(x: Tensor) -> Tensor:
    """Computes log(1 - exp(x)) for x < 0 to full precision (Maechler 2012), also in the gradient."""
    near = x > -math.log(2)
    # Each branch sees only its own values, so that no NaN of the other reaches the gradient.
    close = torch.where(near, x, torch.full_like(x, -1.0))
    far = torch.where(near, torch.full_like(x, -1.0), x)
    return torch.where(near, (-torch.expm1(close)).log(), torch.log1p(-far.exp()))
