"""The term of the objective that compares last hidden states of student and teacher."""

from __future__ import annotations

from torch import Tensor

from stillhouse.student_trainer.config.checks import invalid_field
from stillhouse.student_trainer.config.schema import LossConfig
from stillhouse.student_trainer.train.batching.collate import MicroBatch
from stillhouse.student_trainer.train.loss.hidden import hidden_mse
from stillhouse.student_trainer.train.loss.objective import ObjectiveSum


def with_hidden_mse(
    summed: ObjectiveSum, hidden: Tensor, batch: MicroBatch, loss: LossConfig
) -> ObjectiveSum:
    """Adds the term of `loss.hidden_mse`, if it has one; `hidden` [N, H] is the input of the student's output layer.

    Raises StillhouseError(INVALID_SPEC) for a student that is not as wide as its teacher.
    """
    if loss.hidden_mse is None or not loss.compares_hidden or batch.hidden is None:
        return summed
    if hidden.shape[-1] != batch.hidden.shape[-1]:
        raise invalid_field(
            "loss.hidden_mse",
            f"compares hidden states, of which the teacher's have {batch.hidden.shape[-1]} units and the student's "
            f"{hidden.shape[-1]}. Give a student as wide as the teacher, such as a copy of its layers (student.keep_layers), or "
            "leave it out.",
        )
    weights = batch.positions.weights[0]
    term = hidden_mse(hidden, batch.hidden, weights, normalise=loss.hidden_mse.normalise)
    return ObjectiveSum(
        loss_sum=summed.loss_sum + loss.hidden_mse.weight * term,
        parts={**summed.parts, "hidden_mse": term.detach()},
    )


def require_plain_layer(loss: LossConfig) -> None:
    """Raises StillhouseError(INVALID_SPEC) if hidden states count: the output layer does not show them."""
    if loss.compares_hidden:
        raise invalid_field(
            "loss.hidden_mse",
            "needs a student whose output layer is a plain linear one; this model caps or scales its logits, or the layer has an "
            "adapter. Leave it out.",
        )
