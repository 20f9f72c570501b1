"""Single losses as pure functions (student_logits, targets, weights) -> (loss_sum, denominator), all with one reduction.

Axes: B sequences, T positions, V vocabulary. Row t of the logits predicts the token of row t of the targets; the
alignment is written in protos/stillhouse/v1/tensor.proto. Weights come from reduction.token_weights; a boolean mask
as floats is the weight of "token_mean". A run's complete objective is in objective.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float, Int64
from torch import Tensor, int64

from stillhouse.student_trainer.train.loss.divergences import DIVERGENCES
from stillhouse.student_trainer.train.loss.readout import read_out
from stillhouse.student_trainer.train.loss.reduction import LossSum, reduce
from stillhouse.student_trainer.train.loss.sparse import BucketPair, Targets, teacher_buckets
from stillhouse.student_trainer.train.loss.temperature import (
    TemperatureMode,
    bucket_temperature,
    tempered_divergence,
)


def forward_kl(
    student_logits: Float[Tensor, "B T V"],
    targets: Targets,
    weights: Float[Tensor, "B T"],
    *,
    temperature: float = 1.0,
    mode: TemperatureMode = "exact",
    vocab_size: int | None = None,
) -> LossSum:
    """Sums weight x KL(teacher || student) on the kept tokens and the tail, in nats, and the weights.

    It never exceeds the KL over the whole vocabulary, and equals it if K = V (data processing inequality).
    Its gradient with respect to a logit is q_j - p_j on the kept tokens and q_j - P_tail q_j / Q_tail elsewhere.
    """
    return distillation_loss(
        "forward_kl",
        student_logits,
        targets,
        weights,
        temperature=temperature,
        mode=mode,
        vocab_size=vocab_size,
    )


def distillation_loss(
    name: str,
    student_logits: Float[Tensor, "B T V"],
    targets: Targets,
    weights: Float[Tensor, "B T"],
    *,
    parameters: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    mode: TemperatureMode = "exact",
    vocab_size: int | None = None,
) -> LossSum:
    """Sums weight x the divergence `name` between teacher and student, and the weights."""
    at = bucket_temperature(temperature, mode)
    num_logits = student_logits.shape[-1]
    teacher = teacher_buckets(targets, num_logits=num_logits, vocab_size=vocab_size, temperature=at)
    ids = weights.new_zeros(weights.shape, dtype=int64)
    student = read_out(student_logits, ids, weights, teacher, temperature=at).buckets
    assert student is not None
    pair = BucketPair(teacher_logprobs=teacher.logprobs.to(student.dtype), student_logprobs=student)
    divergence = DIVERGENCES[name].bind(parameters or {})
    return reduce(tempered_divergence(divergence, pair, temperature=temperature, mode=mode), weights)


def cross_entropy(
    student_logits: Float[Tensor, "B T V"], target_ids: Int64[Tensor, "B T"], weights: Float[Tensor, "B T"]
) -> LossSum:
    """Sums weight x -log q(target), in nats at temperature 1, and the weights.

    `target_ids` are in [0, V); they are ignored where the weight is 0.
    """
    return reduce(-read_out(student_logits, target_ids, weights, None).targets, weights)
