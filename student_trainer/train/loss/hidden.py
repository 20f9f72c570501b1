"""Mean squared error between hidden states of student and teacher. Axes: N positions, H hidden units."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


def hidden_mse(
    student: Float[Tensor, "N H"],
    teacher: Float[Tensor, "N H"],
    weights: Float[Tensor, " N"],
    *,
    normalise: bool,
) -> Tensor:
    """sum_n w_n mean_h (student - teacher)^2 in float32, a scalar with the gradient; 0 at positions of weight 0.

    With `normalise` each state has mean 0 and variance 1 over its units first, so that a model's scale does not count.
    """
    ours, theirs = student.float(), teacher.float()
    if normalise:
        ours = functional.layer_norm(ours, ours.shape[-1:])
        theirs = functional.layer_norm(theirs, theirs.shape[-1:])
    return (weights * (ours - theirs).square().mean(-1)).sum()
