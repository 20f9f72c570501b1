"""From examples and teachers' answers to the tensors of one forward pass; the only place where a row of logits meets a row of an answer.

Axes: B sequences, L tokens after padding, N targets of the whole micro-batch, K kept tokens. Only the logits of
targets are ever needed: target t of a sequence is predicted by the model's output at t - 1, and row t - start of the
teacher's answer speaks of it (protos/stillhouse/v1/tensor.proto).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from protos.errors import Reason, StillhouseError
from protos.tensor_codec import Distributions
from student_trainer.train.loss.policy_gradient import SampledTokens
from student_trainer.train.loss.reduction import Reduction
from student_trainer.train.loss.sparse import PAD_ID, SparseTargets
from student_trainer.train.prompts import Example


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """An example, with what the teacher says of its positions [start, T) if it was asked."""

    example: Example
    answer: Distributions | None
    context: int = 0
    """Which of the run's contexts it comes from, by its place in the run file."""
    behaviour_logprobs: np.ndarray | None = None
    """float32 [T - start]: of each token under the distribution that it was drawn from, if the student wrote it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """The tensors of one forward pass. Losses see the N targets as one sequence: [1, N]."""

    input_ids: Tensor
    """int64 [B, L], padded on the right."""
    attention_mask: Tensor
    """int64 [B, L], 0 at padding."""
    columns: Tensor
    """int64 [C]: positions whose output predicts a target in any sequence, ascending."""
    picks: Tensor
    """int64 [N]: each target's place in the outputs of `columns`, flattened from [B, C]."""
    target_ids: Tensor
    """int64 [1, N]."""
    weights: Tensor
    """float32 [1, N]: each target's weight in the objective."""
    targets: SparseTargets | None
    """The teacher's answer, [1, N, K]; None if it was not asked."""
    sampled: SampledTokens | None = None
    """[1, N]: the targets as the student drew them; None if it did not write them."""

    @property
    def num_targets(self) -> int:
        """N."""
        return int(self.picks.shape[0])


def collate(
    scored: Sequence[Scored],
    *,
    reduction: Reduction,
    device: torch.device,
    max_importance_weight: float = np.inf,
) -> MicroBatch:
    """The micro-batch of `scored`, of which either all or none have an answer, and of all or none the student is the writer."""
    longest = max(len(each.example.token_ids) for each in scored)
    input_ids = np.zeros((len(scored), longest), np.int64)
    attention_mask = np.zeros_like(input_ids)
    positions = [np.flatnonzero(each.example.mask) for each in scored]
    for row, each in enumerate(scored):
        length = len(each.example.token_ids)
        input_ids[row, :length] = each.example.token_ids
        attention_mask[row, :length] = 1
    columns = np.unique(np.concatenate(positions)) - 1
    picks = [
        row * len(columns) + np.searchsorted(columns, targets - 1) for row, targets in enumerate(positions)
    ]
    target_ids = [each.example.token_ids[at] for each, at in zip(scored, positions, strict=True)]
    weights = [np.full(len(at), _weight(len(at), reduction), np.float32) for at in positions]
    targets = None
    if all(each.answer is not None for each in scored):
        targets = _targets(scored, positions, device)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return MicroBatch(
        input_ids=tensor(input_ids),
        attention_mask=tensor(attention_mask),
        columns=tensor(columns),
        picks=tensor(np.concatenate(picks).astype(np.int64)),
        target_ids=tensor(np.concatenate(target_ids).astype(np.int64)).unsqueeze(0),
        weights=tensor(np.concatenate(weights)).unsqueeze(0),
        targets=targets,
        sampled=_sampled(scored, positions, device, max_importance_weight),
    )


def total_weight(examples: Sequence[Example], reduction: Reduction) -> float:
    """The denominator of a step: what the weights of its targets sum to."""
    return float(sum(example.num_targets * _weight(example.num_targets, reduction) for example in examples))


def _weight(num_targets: int, reduction: Reduction) -> float:
    """Of each target of a sequence; the same as reduction.token_weights."""
    return 1.0 if reduction == "token_mean" else 1.0 / num_targets


def _targets(
    scored: Sequence[Scored],
    positions: Sequence[np.ndarray],
    device: torch.device,
) -> SparseTargets:
    token_ids, logprobs, log_tail, log_partition = [], [], [], []
    for each, at in zip(scored, positions, strict=True):
        answer = each.answer
        assert answer is not None
        rows = at - answer.start
        token_ids.append(answer.token_ids[rows])
        logprobs.append(answer.logprobs[rows])
        log_tail.append(answer.log_tail[rows])
        if answer.log_partitions is not None and answer.log_partitions.shape[1]:
            log_partition.append(answer.log_partitions[rows, 0])
    widest = max(array.shape[1] for array in token_ids)
    token_ids = [_widened(array, widest, PAD_ID) for array in token_ids]
    logprobs = [_widened(array, widest, -np.inf) for array in logprobs]
    if 0 < len(log_partition) < len(scored):
        raise StillhouseError(
            Reason.TENSOR_INVALID, "The teacher sent log_partitions for some sequences only; see its log."
        )

    def joined(arrays: Sequence[np.ndarray], dtype: type) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays).astype(dtype)).unsqueeze(0).to(device)

    return SparseTargets(
        token_ids=joined(token_ids, np.int64),
        logprobs=joined(logprobs, np.float32),
        log_tail=joined(log_tail, np.float32),
        log_partition=joined(log_partition, np.float32) if log_partition else None,
    )


def _widened(array: np.ndarray, num_columns: int, filling: float) -> np.ndarray:
    """[T, K] with columns of `filling` up to `num_columns`: sequences may have supports of different sizes."""
    missing = num_columns - array.shape[1]
    return np.pad(array, ((0, 0), (0, missing)), constant_values=filling) if missing else array


def _sampled(
    scored: Sequence[Scored],
    positions: Sequence[np.ndarray],
    device: torch.device,
    max_importance_weight: float,
) -> SampledTokens | None:
    teacher, behaviour = [], []
    for each, at in zip(scored, positions, strict=True):
        if each.behaviour_logprobs is None or each.answer is None:
            return None
        teacher.append(each.answer.target_logprobs[at - each.answer.start])
        behaviour.append(each.behaviour_logprobs[at - each.example.start])
    return SampledTokens(
        teacher_logprobs=torch.from_numpy(np.concatenate(teacher)).unsqueeze(0).to(device),
        behaviour_logprobs=torch.from_numpy(np.concatenate(behaviour)).unsqueeze(0).to(device),
        max_importance_weight=max_importance_weight,
    )
