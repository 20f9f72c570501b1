"""The losses that a run can name: pure functions (student_logits, targets, weights) -> (loss_sum, denominator), all with one reduction.

Axes: B sequences, T positions, V vocabulary. Row t of the logits predicts the token that row t of the targets speaks
of; the alignment is written in protos/stillhouse/v1/tensor.proto. Weights come from reduction.token_weights; a
boolean mask as floats is the weight of "token_mean".
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from student_trainer.train.loss.divergences import DIVERGENCES, Divergence, forward_kl_divergence
from student_trainer.train.loss.reduction import LossSum, blank_masked, reduce
from student_trainer.train.loss.sparse import SparseTargets
from student_trainer.train.loss.temperature import TemperatureMode, tempered_divergence

__all__ = ["DIVERGENCES", "cross_entropy", "distillation_loss", "forward_kl"]


def forward_kl(
    student_logits: Float[Tensor, "B T V"],
    targets: SparseTargets,
    weights: Float[Tensor, "B T"],
    *,
    temperature: float = 1.0,
    mode: TemperatureMode = "exact",
    vocab_size: int | None = None,
) -> LossSum:
    """Sum of weight x KL(teacher || student) on the kept tokens and the tail, in nats, and of the weights.

    It never exceeds the KL over the whole vocabulary, and equals it if K = V (data processing inequality).
    Its gradient with respect to a logit is q_j - p_j on the kept tokens and q_j - P_tail q_j / Q_tail elsewhere.
    """
    return distillation_loss(
        forward_kl_divergence,
        student_logits,
        targets,
        weights,
        temperature=temperature,
        mode=mode,
        vocab_size=vocab_size,
    )


def distillation_loss(
    divergence: Divergence,
    student_logits: Float[Tensor, "B T V"],
    targets: SparseTargets,
    weights: Float[Tensor, "B T"],
    *,
    temperature: float = 1.0,
    mode: TemperatureMode = "exact",
    vocab_size: int | None = None,
) -> LossSum:
    """Sum of weight x divergence between teacher and student, in nats, and of the weights."""
    loss_BT = tempered_divergence(
        divergence,
        blank_masked(student_logits, weights),
        targets,
        temperature=temperature,
        mode=mode,
        vocab_size=vocab_size,
    )
    return reduce(loss_BT, weights)


def cross_entropy(
    student_logits: Float[Tensor, "B T V"], target_ids: Int64[Tensor, "B T"], weights: Float[Tensor, "B T"]
) -> LossSum:
    """Sum of weight x -log q(target), in nats at temperature 1, and of the weights.

    `target_ids` are in [0, V); where the weight is 0 they do not matter.
    """
    logits = blank_masked(student_logits, weights)
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    indices = target_ids.masked_fill(weights <= 0, 0).unsqueeze(-1)
    return reduce(wide.logsumexp(-1) - wide.gather(-1, indices).squeeze(-1), weights)
