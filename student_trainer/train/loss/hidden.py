"""Mean squared error between hidden states of student and teacher. Axes: M tokens, H hidden units of the teacher, S of the student."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def hidden_mse(
    student: Float[Tensor, "M S"],
    teacher: Float[Tensor, "M H"],
    weights: Float[Tensor, " M"],
    *,
    projection: Float[Tensor, "H S"] | None = None,
    normalise: bool,
) -> Tensor:
    """sum_m w_m mean_h (W student - teacher)^2 in float32, a scalar with the gradient; 0 at tokens of weight 0.

    W is `projection`, None the identity, as in TinyBERT (Jiao et al. 2020, equation 8). With `normalise` each state has mean 0
    and variance 1 over the H units first, so that a model's scale does not count.
    """
    with torch.autocast(student.device.type, enabled=False):
        ours, theirs = student.float(), teacher.float()
        if projection is not None:
            ours = functional.linear(ours, projection)
        if normalise:
            ours = functional.layer_norm(ours, ours.shape[-1:])
            theirs = functional.layer_norm(theirs, theirs.shape[-1:])
        return (weights * (ours - theirs).square().mean(-1)).sum()
