"""Single losses, each as the objective of a run with a single term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.train.loss.objective import objective
from stillhouse.student_trainer.train.loss.reduction import LossSum
from stillhouse.student_trainer.train.loss.sparse import Targets


def forward_kl(
    student_logits: Tensor,
    targets: Targets,
    weights: Tensor,
    *,
    temperature: float = 1.0,
    mode: str = "exact",
    vocab_size: int | None = None,
) -> LossSum:
    """Sums weight x KL(teacher || student) on the kept tokens and the tail, in nats, and the weights."""
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
    student_logits: Tensor,
    targets: Targets,
    weights: Tensor,
    *,
    parameters: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    mode: str = "exact",
    vocab_size: int | None = None,
) -> LossSum:
    """Sums weight x the divergence `name` between teacher and student, and the weights."""
    term = replace(LossTermConfig(divergence=name), **dict[str, Any](parameters or {}))
    loss = LossConfig(terms=(term,), temperature=temperature, temperature_mode=mode)
    # A text that the student does not exclude: its cross-entropy has weight 0, and 0 x inf is NaN.
    ids = student_logits.detach().argmax(-1)
    summed = objective(student_logits, ids, targets, weights, loss, vocab_size=vocab_size)
    return LossSum(summed.loss_sum, weights.sum())


def cross_entropy(student_logits: Tensor, target_ids: Tensor, weights: Tensor) -> LossSum:
    """Sums weight x -log q(target), in nats at temperature 1, and the weights."""
    loss = LossConfig(terms=(), hard_weight=1.0)
    return LossSum(objective(student_logits, target_ids, None, weights, loss).loss_sum, weights.sum())
