"""Reduces losses per token to a weighted sum and its denominator, which the caller adds up over an optimizer step.

L = sum of weighted losses / sum of weights, both over every micro-batch of the step, so that splitting a step into
micro-batches changes nothing. Axes: B sequences, T positions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Reduction = Literal["token_mean", "sequence_mean"]


class LossSum(NamedTuple):
    """A weighted loss sum and its denominator."""

    loss_sum: Tensor
    """Scalar, with the gradient: sum of weight x loss, in nats."""
    denominator: Tensor
    """Scalar, without gradient: sum of the weights."""


def reduce(loss_BT: Float[Tensor, "B T"], weights_BT: Float[Tensor, "B T"]) -> LossSum:
    """Sums weight x loss, and the weights; a position of weight 0 adds nothing even if its loss is non-finite."""
    kept = torch.where(weights_BT > 0, loss_BT, torch.zeros_like(loss_BT))
    return LossSum((kept * weights_BT).sum(), weights_BT.sum())


def blank_masked(logits: Float[Tensor, "B T V"], weights_BT: Float[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
    """Zeroes logits at positions of weight 0, so that nothing there reaches a gradient (0 x NaN is NaN)."""
    keep = weights_BT > 0
    return logits if bool(keep.all()) else torch.where(keep.unsqueeze(-1), logits, torch.zeros_like(logits))
