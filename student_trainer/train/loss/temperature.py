"""Divergences at a softmax temperature, from top-k log-probabilities: exact where the teacher sends its log-partition, else conditional.

With l = log p over the whole vocabulary, p_T(i) = exp(l_i / T - A_T), A_T = log sum_v exp(l_v / T). The kept tokens and
A_T give the tail of p_T without error; the kept tokens alone do not, however large K is. Axes as in sparse.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from student_trainer.train.loss.divergences import Divergence
from student_trainer.train.loss.sparse import BucketPair, SparseTargets, coarsen, normalise

TemperatureMode = Literal["exact", "conditional"]


def tempered_divergence(
    divergence: Divergence,
    student_logits: Float[Tensor, "B T V"],
    targets: SparseTargets,
    *,
    temperature: float,
    mode: TemperatureMode,
    vocab_size: int | None,
) -> Float[Tensor, "B T"]:
    """Loss per position, scaled by the temperature's square, which keeps the size of the gradient.

    exact: T^2 D(p_T || q_T). conditional: D(P_S || Q_S) + P_S T^2 D(p_T(.|S) || q_T(.|S)), where S is the kept
    tokens: whether the next token is kept is compared at temperature 1, and which of them it is at T. For KL and
    T = 1 both are the KL of the buckets. Raises ValueError for "exact" without a log-partition and T != 1.
    """
    if temperature == 1.0:
        pair = _plain(student_logits, targets, vocab_size)
        return divergence(pair.teacher_logprobs, pair.student_logprobs)
    if mode == "exact":
        pair = _exact(student_logits, targets, temperature, vocab_size)
        return temperature**2 * divergence(pair.teacher_logprobs, pair.student_logprobs)
    return _conditional(divergence, _plain(student_logits, targets, vocab_size), temperature)


def _plain(logits: Tensor, targets: SparseTargets, vocab_size: int | None) -> BucketPair:
    return coarsen(logits, targets.token_ids, targets.logprobs, targets.log_tail, vocab_size)


def _exact(logits: Tensor, targets: SparseTargets, temperature: float, vocab_size: int | None) -> BucketPair:
    """Both sides at `temperature`; the teacher's tail is 1 - sum in float64, and nothing where it was nothing."""
    if targets.log_partition is None:
        raise ValueError(f"temperature {temperature:g} in mode exact needs the teacher's log_partition")
    tempered = targets.logprobs.double() / temperature - targets.log_partition.double().unsqueeze(-1)
    kept_mass = tempered.masked_fill(targets.token_ids < 0, -torch.inf).exp().sum(-1)
    log_tail = (1.0 - kept_mass).clamp(min=0.0).log()
    log_tail = log_tail.masked_fill(torch.isneginf(targets.log_tail), -torch.inf)
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return coarsen(wide / temperature, targets.token_ids, tempered, log_tail, vocab_size)


def _conditional(divergence: Divergence, pair: BucketPair, temperature: float) -> Tensor:
    teacher_kept, student_kept = pair.teacher_logprobs[..., :-1], pair.student_logprobs[..., :-1]
    log_mass_teacher, log_mass_student = _log_mass(teacher_kept), _log_mass(student_kept)
    kept_or_not = divergence(
        torch.stack([log_mass_teacher, pair.teacher_logprobs[..., -1]], dim=-1),
        torch.stack([log_mass_student, pair.student_logprobs[..., -1]], dim=-1),
    )
    which = divergence(_sharpen(teacher_kept, temperature), _sharpen(student_kept, temperature))
    return kept_or_not + temperature**2 * log_mass_teacher.exp() * which


def _log_mass(logprobs: Tensor) -> Tensor:
    """log sum exp over the kept tokens; -inf, without a gradient, where there is none."""
    empty = torch.isneginf(logprobs).all(-1)
    return logprobs.masked_fill(empty.unsqueeze(-1), 0.0).logsumexp(-1).masked_fill(empty, -torch.inf)


def _sharpen(logprobs: Tensor, temperature: float) -> Tensor:
    """The distribution among the kept tokens at `temperature`."""
    empty = torch.isneginf(logprobs).all(-1, keepdim=True)
    return normalise(logprobs.masked_fill(empty, 0.0) / temperature).masked_fill(empty, -torch.inf)
