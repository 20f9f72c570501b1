"""Divergences between two bucketed distributions, per position: pure functions of log-probabilities, without masks or reduction.

To add one, write a function of this signature and name it in DIVERGENCES. Axes: B sequences, T positions, S buckets.
A bucket that is empty is -inf on both sides, or only in the teacher; no term may become 0 x inf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(teacher_logprobs_BTS, student_logprobs_BTS) -> loss_BT, in nats."""


def forward_kl_divergence(
    teacher_logprobs: Float[Tensor, "B T S"], student_logprobs: Float[Tensor, "B T S"]
) -> Float[Tensor, "B T"]:
    """KL(teacher || student) = sum_s p_s (log p_s - log q_s), >= 0; 0 iff both are equal."""
    present = ~torch.isneginf(teacher_logprobs)
    log_p = teacher_logprobs.masked_fill(~present, 0.0)
    log_q = student_logprobs.masked_fill(~present, 0.0)
    return (log_p.exp() * (log_p - log_q)).masked_fill(~present, 0.0).sum(-1)


DIVERGENCES: Mapping[str, Divergence] = {"forward_kl": forward_kl_divergence}
"""By their names in a run file."""
