"""What losses need of a student's logits: the log-probabilities of a few buckets and of the text's own tokens, and nothing of size V.

Every loss is a function of a readout. Its gradient with respect to the logits follows from that with respect to the
readout in closed form, which fused.py uses. Axes as in sparse.py.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float, Int64
from torch import Tensor

from stillhouse.student_trainer.train.loss.reduction import blank_masked
from stillhouse.student_trainer.train.loss.sparse import TeacherBuckets, student_buckets, widened


class Readout(NamedTuple):
    """A student at some positions, in float32 at least; numbers of no meaning where the weight is 0."""

    buckets: Tensor | None
    """[B, T, S]: log-probabilities of the teacher's buckets at the temperature of the terms; None without a teacher."""
    targets: Tensor
    """[B, T]: log q of the text's own token, at temperature 1."""


def read_out(
    student_logits: Float[Tensor, "B T V"],
    target_ids: Int64[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
    teacher: TeacherBuckets | None,
    *,
    temperature: float = 1.0,
) -> Readout:
    """The readout of logits, with gradients by autograd. `target_ids` do not matter where the weight is 0."""
    logits = widened(blank_masked(student_logits, weights))
    ids = target_ids.masked_fill(weights <= 0, 0).unsqueeze(-1)
    targets = logits.gather(-1, ids).squeeze(-1) - logits.logsumexp(-1)
    if teacher is None:
        return Readout(buckets=None, targets=targets)
    tempered = logits if temperature == 1.0 else logits / temperature
    return Readout(buckets=student_buckets(tempered, teacher), targets=targets)
