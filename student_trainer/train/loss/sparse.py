"""Coarse-graining onto the teacher's kept tokens and one tail bucket: the only place that forms the compared pair.

Axes: B sequences, T positions, K kept tokens, V vocabulary, S = K + 1 buckets, the last of which is the tail.
An id at or above `vocab_size` belongs to the tail on both sides, so a partition of the vocabulary is compared and
a student that equals its teacher has loss 0, whatever rows pad the two output layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError

PAD_ID = -1
"""Stands in `token_ids` where a row has fewer than K tokens."""
FORBIDDEN_LOGPROB = -1e4
"""Finite log-probability charged to a student whose logit is -inf; it carries no gradient."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseTargets:
    """Sparse teacher outputs: the kept (top-k or sampled) tokens of each position and the mass of all others."""

    token_ids: Int64[Tensor, "B T K"]
    """Distinct ids of a row; PAD_ID in unused columns."""
    logprobs: Float[Tensor, "B T K"]
    """Natural log-probabilities at temperature 1 over the teacher's whole vocabulary; ignored at PAD_ID."""
    log_tail: Float[Tensor, "B T"]
    """Log of the mass outside the K tokens; -inf if there is none."""
    log_partition: Float[Tensor, "B T"] | None = None
    """log sum_v p_v^(1/temperature) at the run's temperature; None if the teacher did not send it."""
    draw_shares: Float[Tensor, "B T K"] | None = None
    """Share of a row's draws that each token has, 0 for tokens that are kept; None without draws. Drawn tokens have an id
    and a logprob of their own and belong to the tail: they estimate how it is distributed, at the run's temperature. Of draws of
    the student: the share over the probability with which the token was drawn."""

    def __post_init__(self) -> None:
        """Raises StillhouseError(NON_FINITE) if a field holds NaN or +inf."""
        for name in ("logprobs", "log_tail", "log_partition", "draw_shares"):
            values: Tensor | None = getattr(self, name)
            # One pass: the largest of values with a NaN among them is NaN.
            if values is not None and values.numel() and not bool(values.amax() < torch.inf):
                raise StillhouseError(
                    Reason.NON_FINITE,
                    f"The teacher's {name} hold NaN or +inf, which no distribution has. "
                    "Look at the teacher's log; its weights or its precision may be broken.",
                )

    def rows(self, rows: slice | Tensor) -> SparseTargets:
        """Selects positions: a slice of T, or indices into it."""
        partition, shares = self.log_partition, self.draw_shares
        return SparseTargets(
            token_ids=self.token_ids[:, rows],
            logprobs=self.logprobs[:, rows],
            log_tail=self.log_tail[:, rows],
            log_partition=None if partition is None else partition[:, rows],
            draw_shares=None if shares is None else shares[:, rows],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseTargets:
    """Complete teacher distributions, from a teacher in the same process."""

    logprobs: Float[Tensor, "B T W"]
    """Natural log-probabilities at temperature 1 over the teacher's vocabulary; W may differ from V."""

    def rows(self, rows: slice | Tensor) -> DenseTargets:
        """Selects positions: a slice of T, or indices into it."""
        return DenseTargets(logprobs=self.logprobs[:, rows])


Targets: TypeAlias = SparseTargets | DenseTargets


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherBuckets:
    """Teacher distributions over buckets, and the token ids of these."""

    token_ids: Int64[Tensor, "B T K"] | None
    """Ids as the teacher sent them; None if the buckets are the first S - 1 ids in order and the tail."""
    kept: Bool[Tensor, "B T K"] | None
    """True for ids with a bucket of their own; others are pads or belong to the tail."""
    logprobs: Float[Tensor, "B T S"]
    """Float64; rows sum to 1; -inf marks an empty bucket; a row without mass is -inf throughout. With draws, rows sum to 1
    over kept tokens and the tail; a drawn token's own is in addition."""
    draw_shares: Float[Tensor, "B T K"] | None = None
    """Float64: share of the row's draws that each token has, 0 for kept tokens; None without draws."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnTail:
    """The student's and the teacher's probabilities of drawn tokens, and of the tail that they were drawn from."""

    shares: Float[Tensor, "B T K"]
    """Share of each token in the row's draws; 0 where it counts for nothing."""
    log_ratios: Float[Tensor, "B T K"]
    """log q - log p of the token, with gradient; 0 where the share is 0."""
    log_tail: Float[Tensor, "B T 1"]
    """The teacher's tail; -inf where it is empty."""
    log_tail_ratio: Float[Tensor, "B T 1"]
    """log Q - log P of the tail, with gradient; 0 where it is empty."""
    student_logprobs: Float[Tensor, "B T K"]
    """log q of the token, with gradient; 0 where the share is 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketPair:
    """Teacher and student over the same S buckets; each row sums to 1, -inf marks an empty bucket."""

    teacher_logprobs: Float[Tensor, "B T S"]
    """Without gradient, in the student's dtype."""
    student_logprobs: Float[Tensor, "B T S"]
    """Float32 or wider, with gradient."""
    drawn: DrawnTail | None = None
    """Draws from the tail, if there are any."""


def bucket_pair(teacher: TeacherBuckets, student_logprobs: Float[Tensor, "B T S"]) -> BucketPair:
    """Pairs the teacher's buckets with the student's, in which drawn tokens are apart; in the pair they are in the tail."""
    logprobs = teacher.logprobs.to(student_logprobs.dtype)
    if teacher.draw_shares is None or teacher.kept is None:
        return BucketPair(teacher_logprobs=logprobs, student_logprobs=student_logprobs)
    is_drawn = teacher.draw_shares > 0
    shares = teacher.draw_shares.masked_fill(~teacher.kept, 0.0).to(student_logprobs.dtype)
    student_draws = student_logprobs[..., :-1].masked_fill(~is_drawn, -torch.inf)
    student_tail = _log_sum(torch.cat([student_draws, student_logprobs[..., -1:]], dim=-1))
    log_tail = logprobs[..., -1:]
    has_none = torch.isneginf(log_tail)
    counts = (shares > 0) & ~has_none & torch.isfinite(logprobs[..., :-1])
    own_logprobs = student_logprobs[..., :-1].masked_fill(~counts, 0.0)
    log_ratios = own_logprobs - logprobs[..., :-1].masked_fill(~counts, 0.0)
    tail_ratio = torch.where(
        has_none, torch.zeros_like(log_tail), student_tail - log_tail.masked_fill(has_none, 0.0)
    )
    return BucketPair(
        teacher_logprobs=torch.cat([logprobs[..., :-1].masked_fill(is_drawn, -torch.inf), log_tail], dim=-1),
        student_logprobs=torch.cat(
            [student_logprobs[..., :-1].masked_fill(is_drawn, -torch.inf), student_tail], dim=-1
        ),
        drawn=DrawnTail(
            shares=shares.masked_fill(~counts, 0.0),
            log_ratios=log_ratios,
            log_tail=log_tail,
            log_tail_ratio=tail_ratio.masked_fill(torch.isneginf(student_tail), 0.0),
            student_logprobs=own_logprobs,
        ),
    )


def _log_sum(logprobs: Float[Tensor, "B T S"]) -> Float[Tensor, "B T 1"]:
    """Returns log sum exp of the last axis; -inf, without a gradient, where all are."""
    empty = torch.isneginf(logprobs).all(-1, keepdim=True)
    total = logprobs.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True)
    return total.masked_fill(empty, -torch.inf)


def teacher_buckets(
    targets: Targets, *, num_logits: int, vocab_size: int | None = None, temperature: float = 1.0
) -> TeacherBuckets:
    """Puts the teacher's outputs into kept-token and tail buckets at `temperature`, for a student with `num_logits` logits.

    `vocab_size` is the effective vocabulary, `num_logits` if None: a teacher's id at or above it moves to the tail.
    Where the student has no token outside the kept ones there is no tail, and the teacher is normalised over the rest.
    Raises ValueError for a temperature other than 1 without a log-partition.
    """
    limit = num_logits if vocab_size is None else min(vocab_size, num_logits)
    if isinstance(targets, DenseTargets):
        tempered = normalise(targets.logprobs.double() / temperature)
        logprobs = _first_ids_and_rest(tempered, min(limit, tempered.shape[-1]), has_rest=limit < num_logits)
        return TeacherBuckets(token_ids=None, kept=None, logprobs=normalise(logprobs))
    logprobs, log_tail = targets.logprobs.double(), targets.log_tail.double()
    shares = targets.draw_shares
    is_drawn = torch.zeros_like(targets.token_ids, dtype=torch.bool) if shares is None else shares > 0
    if temperature != 1.0:
        logprobs, log_tail = _tempered(targets, logprobs, temperature, is_drawn)
    kept = (targets.token_ids >= 0) & (targets.token_ids < limit)
    out_of_range = (targets.token_ids >= limit) & ~is_drawn
    if bool(out_of_range.any()):
        beyond = logprobs.masked_fill(~out_of_range, -torch.inf)
        log_tail = torch.cat([log_tail.unsqueeze(-1), beyond], dim=-1).logsumexp(-1)
    has_tail = (kept & ~is_drawn).sum(-1) < num_logits
    log_tail = log_tail.masked_fill(~has_tail, -torch.inf)
    known = logprobs.masked_fill(~kept | is_drawn, -torch.inf)
    buckets = normalise(torch.cat([known, log_tail.unsqueeze(-1)], dim=-1))
    if shares is not None:
        own = torch.where(is_drawn, logprobs.masked_fill(~kept, -torch.inf), buckets[..., :-1])
        buckets = torch.cat([own, buckets[..., -1:]], dim=-1)
    return TeacherBuckets(
        token_ids=targets.token_ids,
        kept=kept,
        logprobs=buckets,
        draw_shares=None if shares is None else shares.double(),
    )


def student_buckets(logits: Float[Tensor, "B T V"], teacher: TeacherBuckets) -> Float[Tensor, "B T S"]:
    """Returns the student's log-probabilities of the teacher's kept tokens and, last, of the tail.

    Computed in float32 or wider. The tail is a logsumexp over its tokens, not 1 - sum, so that it is exact at 1e-30
    and has a gradient everywhere. -inf marks an empty bucket.
    """
    wide = widened(logits)
    token_ids, kept = teacher.token_ids, teacher.kept
    if token_ids is None or kept is None:
        num_ids = teacher.logprobs.shape[-1] - 1
        return _first_ids_and_rest(
            charge_forbidden(wide.log_softmax(-1)), num_ids, has_rest=num_ids < wide.shape[-1]
        )
    log_total = wide.logsumexp(-1)
    gathered = wide.gather(-1, token_ids.masked_fill(~kept, 0)) - log_total.unsqueeze(-1)
    kept_logprobs = charge_forbidden(gathered).masked_fill(~kept, -torch.inf)

    # Ids that are not kept go to an extra column behind the vocabulary.
    batch, positions, num_logits = logits.shape
    support = torch.zeros(batch, positions, num_logits + 1, dtype=torch.bool, device=logits.device)
    support.scatter_(-1, token_ids.masked_fill(~kept, num_logits), value=True)
    support = support[..., :num_logits]
    empty = support.all(-1)
    # logsumexp has no gradient if all of its arguments are -inf: such rows are replaced before it.
    others = wide.masked_fill(support & ~empty.unsqueeze(-1), -torch.inf)
    forbidden = torch.isneginf(others).all(-1)
    others = others.masked_fill(forbidden.unsqueeze(-1), 0.0)
    tail = (others.logsumexp(-1) - log_total).masked_fill(forbidden, FORBIDDEN_LOGPROB)
    return torch.cat([kept_logprobs, tail.masked_fill(empty, -torch.inf).unsqueeze(-1)], dim=-1)


def normalise(logprobs: Float[Tensor, "B T S"]) -> Float[Tensor, "B T S"]:
    """Scales rows of log-probabilities to sum to 1; a row that is -inf throughout is unchanged.

    Rounding on the wire leaves sums off by up to 1e-3, and a divergence of such measures can be negative.
    """
    log_total = logprobs.logsumexp(-1, keepdim=True)
    return logprobs - log_total.masked_fill(torch.isneginf(log_total), 0.0)


def widened(logits: Tensor) -> Tensor:
    """Casts half precision to float32: its exponentials are too coarse for probabilities."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def charge_forbidden(logprobs: Tensor) -> Tensor:
    """Replaces -inf by FORBIDDEN_LOGPROB."""
    return torch.where(torch.isneginf(logprobs), torch.full_like(logprobs, FORBIDDEN_LOGPROB), logprobs)


def _first_ids_and_rest(
    logprobs: Float[Tensor, "B T V"], num_ids: int, *, has_rest: bool
) -> Float[Tensor, "B T S"]:
    """Returns the first `num_ids` columns and the mass of the others, -inf unless `has_rest`."""
    rest = logprobs[..., num_ids:]
    if has_rest and rest.shape[-1]:
        log_rest = rest.logsumexp(-1, keepdim=True)
    else:
        log_rest = torch.full_like(logprobs[..., :1], -torch.inf)
    return torch.cat([logprobs[..., :num_ids], log_rest], dim=-1)


def _tempered(
    targets: SparseTargets,
    logprobs: Float[Tensor, "B T K"],
    temperature: float,
    is_drawn: Bool[Tensor, "B T K"],
) -> tuple[Float[Tensor, "B T K"], Float[Tensor, "B T"]]:
    """Returns kept tokens and tail at `temperature`: the tail is 1 - sum in float64, and stays empty if it was."""
    if targets.log_partition is None:
        raise ValueError(f"temperature {temperature:g} in mode exact needs the teacher's log_partition")
    tempered = logprobs / temperature - targets.log_partition.double().unsqueeze(-1)
    kept_mass = tempered.masked_fill((targets.token_ids < 0) | is_drawn, -torch.inf).exp().sum(-1)
    log_tail = (1.0 - kept_mass).clamp(min=0.0).log()
    return tempered, log_tail.masked_fill(torch.isneginf(targets.log_tail), -torch.inf)
