"""Coarse-graining onto the teacher's kept tokens and one tail bucket: the only place that forms the pair which every divergence compares.

Axes: B sequences, T positions, K kept tokens, V vocabulary, S = K + 1 buckets, the last of which is the tail.
An id at or above `vocab_size` belongs to the tail on both sides, so a partition of the vocabulary is compared and
a student that equals its teacher has loss 0, whatever rows pad the two output layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from protos.errors import Reason, StillhouseError

PAD_ID = -1
"""Stands in `token_ids` where a row has fewer than K tokens."""
FORBIDDEN_LOGPROB = -1e4
"""Log-probability that a student is charged with where its logit is -inf: finite, and without a gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseTargets:
    """What a teacher says at each position: its likeliest tokens, and the mass of all others."""

    token_ids: Int64[Tensor, "B T K"]
    """Distinct ids of a row; PAD_ID where a row has fewer."""
    logprobs: Float[Tensor, "B T K"]
    """Natural log-probabilities at temperature 1 over the teacher's whole vocabulary; ignored at PAD_ID."""
    log_tail: Float[Tensor, "B T"]
    """Log of the mass outside the K; -inf where nothing is."""
    log_partition: Float[Tensor, "B T"] | None = None
    """log sum_v p_v^(1/temperature) of the run's temperature; None where the teacher did not send it."""

    def __post_init__(self) -> None:
        """Raise StillhouseError(NON_FINITE) for numbers that are no log-probabilities."""
        for name in ("logprobs", "log_tail", "log_partition"):
            values: Tensor | None = getattr(self, name)
            if values is not None and bool((values.isnan() | values.isposinf()).any()):
                raise StillhouseError(
                    Reason.NON_FINITE,
                    f"The teacher's {name} hold NaN or +inf, which no distribution has. "
                    "Look at the teacher's log; its weights or its precision may be broken.",
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketPair:
    """Teacher and student over the same S buckets; each row sums to 1, -inf marks an empty bucket."""

    teacher_logprobs: Float[Tensor, "B T S"]
    """Without gradient; a row without any mass, as at a masked position, is -inf throughout."""
    student_logprobs: Float[Tensor, "B T S"]
    """Float32 at least, with gradient."""


def coarsen(
    student_logits: Float[Tensor, "B T V"],
    teacher_token_ids: Int64[Tensor, "B T K"],
    teacher_logprobs: Float[Tensor, "B T K"],
    teacher_log_tail: Float[Tensor, "B T"],
    vocab_size: int | None = None,
) -> BucketPair:
    """Teacher and student on the kept tokens and the tail.

    `vocab_size` is the effective vocabulary, V if None: a teacher's id at or above it moves to the tail. Where the
    student has no token outside the kept ones, there is no tail, and the teacher is normalised over the rest.
    """
    num_logits = student_logits.shape[-1]
    limit = num_logits if vocab_size is None else min(vocab_size, num_logits)
    kept, folded_logprobs, folded_log_tail = _fold(
        teacher_token_ids, teacher_logprobs.double(), teacher_log_tail.double(), limit
    )
    student_kept, student_tail = student_buckets(student_logits, teacher_token_ids, kept)
    has_tail = kept.sum(-1) < num_logits
    folded_log_tail = folded_log_tail.masked_fill(~has_tail, -torch.inf)
    teacher = normalise(torch.cat([folded_logprobs, folded_log_tail.unsqueeze(-1)], dim=-1))
    student = torch.cat([student_kept, student_tail.unsqueeze(-1)], dim=-1)
    return BucketPair(teacher_logprobs=teacher.to(student.dtype), student_logprobs=student)


def student_buckets(
    logits: Float[Tensor, "B T V"], token_ids: Int64[Tensor, "B T K"], kept: Bool[Tensor, "B T K"]
) -> tuple[Float[Tensor, "B T K"], Float[Tensor, "B T"]]:
    """The student's log-probabilities of the kept tokens, and of all others together.

    In float32 at least, which is set before the softmax. The tail is a logsumexp over the tokens that it consists
    of, and not 1 - sum, so that it is exact at 1e-30 and has a gradient everywhere. -inf where a bucket is empty.
    """
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    log_total = wide.logsumexp(-1)
    gathered = wide.gather(-1, token_ids.masked_fill(~kept, 0)) - log_total.unsqueeze(-1)
    kept_logprobs = _charge_forbidden(gathered).masked_fill(~kept, -torch.inf)

    # A column behind the vocabulary takes the ids that are not kept.
    batch, positions, num_logits = logits.shape
    support = torch.zeros(batch, positions, num_logits + 1, dtype=torch.bool, device=logits.device)
    support.scatter_(-1, token_ids.masked_fill(~kept, num_logits), value=True)
    support = support[..., :num_logits]
    empty = support.all(-1)
    # logsumexp has no gradient where all of its arguments are -inf: such rows are replaced before it.
    others = wide.masked_fill(support & ~empty.unsqueeze(-1), -torch.inf)
    forbidden = torch.isneginf(others).all(-1)
    others = others.masked_fill(forbidden.unsqueeze(-1), 0.0)
    tail = (others.logsumexp(-1) - log_total).masked_fill(forbidden, FORBIDDEN_LOGPROB)
    return kept_logprobs, tail.masked_fill(empty, -torch.inf)


def normalise(logprobs: Float[Tensor, "B T S"]) -> Float[Tensor, "B T S"]:
    """Log-probabilities whose rows sum to 1; a row that is -inf throughout stays so.

    Rounding on the wire leaves sums that are off by up to 1e-3; a divergence of such measures can be negative.
    """
    log_total = logprobs.logsumexp(-1, keepdim=True)
    return logprobs - log_total.masked_fill(torch.isneginf(log_total), 0.0)


def _fold(
    token_ids: Int64[Tensor, "B T K"],
    logprobs: Float[Tensor, "B T K"],
    log_tail: Float[Tensor, "B T"],
    limit: int,
) -> tuple[Bool[Tensor, "B T K"], Float[Tensor, "B T K"], Float[Tensor, "B T"]]:
    """Which ids the student knows, and the teacher with the mass of the others in its tail."""
    kept = (token_ids >= 0) & (token_ids < limit)
    foreign = token_ids >= limit
    beyond = logprobs.masked_fill(~foreign, -torch.inf)
    log_tail = torch.cat([log_tail.unsqueeze(-1), beyond], dim=-1).logsumexp(-1)
    return kept, logprobs.masked_fill(~kept, -torch.inf), log_tail


def _charge_forbidden(logprobs: Tensor) -> Tensor:
    return torch.where(torch.isneginf(logprobs), torch.full_like(logprobs, FORBIDDEN_LOGPROB), logprobs)
