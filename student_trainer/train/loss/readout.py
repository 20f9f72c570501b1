"""Log-probabilities that losses need from a student's logits: a few buckets and the text's own tokens, nothing of size V.

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
    """Log-probabilities of a student, float32 or wider; arbitrary where the weight is 0."""

    buckets: Float[Tensor, "B T S"] | None
    """Log-probabilities of the teacher's buckets at the terms' temperature; None without a teacher."""
    targets: Float[Tensor, "B T"]
    """log q of the text's own token, at temperature 1."""


def read_out(
    student_logits: Float[Tensor, "B T V"],
    target_ids: Int64[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
    teacher: TeacherBuckets | None,
    *,
    temperature: float = 1.0,
) -> Readout:
    """Reads logits out, with gradients by autograd. `target_ids` are ignored where the weight is 0."""
    logits = widened(blank_masked(student_logits, weights))
    ids = target_ids.masked_fill(weights <= 0, 0).unsqueeze(-1)
    targets = logits.gather(-1, ids).squeeze(-1) - logits.logsumexp(-1)
    if teacher is None:
        return Readout(buckets=None, targets=targets)
    tempered = logits if temperature == 1.0 else logits / temperature
    return Readout(buckets=student_buckets(tempered, teacher), targets=targets)
