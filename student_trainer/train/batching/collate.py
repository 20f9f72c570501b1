"""Collates examples and teachers' targets into the tensors of one forward pass; aligns rows of logits and targets, here alone.

Axes: B sequences, L tokens after padding, N targets of the whole micro-batch, K kept tokens. Only the logits of
targets are ever needed: target t of a sequence is predicted by the model's output at t - 1, and row t - start of the
teacher's answer speaks of it (protos/stillhouse/v1/tensor.proto).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.train.batching.target_forms import (
    TargetForm,
    TargetRows,
    TokenWeighting,
    entropy,
    target_rows,
    token_factor,
)
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.loss.alm import ChunkTargets
from stillhouse.student_trainer.train.loss.objective import Positions
from stillhouse.student_trainer.train.loss.policy_gradient import SampledTokens
from stillhouse.student_trainer.train.loss.reduction import Reduction
from stillhouse.student_trainer.train.loss.sparse import PAD_ID, SparseTargets


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredExample:
    """An example, with the teacher's distributions at positions [start, T), if it has any."""

    example: Example
    answer: Distributions | None
    context: int = 0
    """Its context, by the place in the run file."""
    behaviour_logprobs: np.ndarray | None = None
    """float32 [T - start]: log-probability of each token under its sampling distribution; None unless it is a rollout."""
    group: int = 0
    """Number of a rollout's prompt."""
    baseline: np.ndarray | None = None
    """float32 [T - start]: baseline of each token's advantage; None means 0."""
    draw_logprobs: np.ndarray | None = None
    """float32 [T - start, R]: of the student's draws, which stand in the answer as sampled tokens, in the distribution that they
    are from; None without such."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StateTargets:
    """Hidden states of the teacher at M tokens, after D layers."""

    states: Tensor
    """float32 [M, D, H]."""
    places: Tensor
    """int64 [M]: each token's place in the input, flattened from [B, L]."""
    weights: Tensor
    """float32 [M], as those of targets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """The tensors of one forward pass. Losses see the N targets as one sequence: [1, N]."""

    input_ids: Tensor
    """int64 [B, L], padded on the right; [1, L] if packed, one sequence after the other."""
    attention_mask: Tensor | None
    """int64 [B, L], 0 at padding; None if packed."""
    position_ids: Tensor | None
    """int64 [1, L] if packed: each token's place in its own sequence; else None."""
    columns: Tensor
    """int64 [C]: positions whose output predicts a target in any sequence, ascending."""
    picks: Tensor
    """int64 [N]: each target's place in the outputs of `columns`, flattened from [B, C]."""
    positions: Positions
    """Targets, [1, N]: `weights` in the objective, `targets` (the teacher's distributions, [1, N, K]) None without a teacher,
    `sampled` None unless they are rollouts."""
    chunks: ChunkTargets | None = None
    """The teacher's log-probabilities of chunks if its tokenizer is foreign; `positions.targets` is None then."""
    states: StateTargets | None = None
    """The teacher's hidden states; None if it sent none."""
    token_type_ids: Tensor | None = None
    """int64 [B, L]: segments of a classifier's pairs of texts; None if there are none."""

    @property
    def num_targets(self) -> int:
        """Number of targets, N."""
        return int(self.picks.shape[0])


def collate(
    scored: Sequence[ScoredExample],
    *,
    reduction: Reduction,
    device: torch.device,
    max_importance_weight: float = np.inf,
    form: TargetForm = "tail_bucket",
    temperature: float = 1.0,
    factors: Sequence[Factor] = (),
    packing: bool = False,
    chunk_scale: float = 1.0,
) -> MicroBatch:
    """The micro-batch of `scored`, of which all or none have distributions, and all or none are rollouts.

    `form` represents the tokens beyond the teacher's top-k, for a loss at `temperature`. With `packing` the sequences lie in one row
    without padding. `chunk_scale` multiplies the weights of chunks.
    """
    positions = [np.flatnonzero(each.example.mask) for each in scored]
    target_ids = [each.example.token_ids[at] for each, at in zip(scored, positions, strict=True)]
    weights = [np.full(len(at), _weight(len(at), reduction), np.float32) for at in positions]
    answered = all(each.answer is not None for each in scored)
    foreign = answered and all(each.example.aligned is not None for each in scored)
    model_inputs = _packed(scored, positions) if packing else _padded(scored, positions)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return MicroBatch(
        input_ids=tensor(model_inputs.input_ids),
        attention_mask=_optional(model_inputs.attention_mask, device),
        position_ids=_optional(model_inputs.position_ids, device),
        columns=tensor(model_inputs.columns),
        picks=tensor(model_inputs.picks),
        positions=Positions(
            target_ids=tensor(np.concatenate(target_ids).astype(np.int64)).unsqueeze(0),
            weights=tensor(np.concatenate(weights)).unsqueeze(0),
            targets=_targets(scored, positions, device, form, temperature)
            if answered and not foreign
            else None,
            sampled=_sampled(scored, positions, device, max_importance_weight),
            token_factors={
                each.weighting: tensor(
                    np.concatenate([each.compute(*pair) for pair in zip(scored, positions, strict=True)])
                ).unsqueeze(0)
                for each in factors
                if answered and not foreign
            },
        ),
        states=_states(scored, positions, model_inputs, weights, device)
        if answered and not foreign
        else None,
        chunks=_chunks(scored, positions, device, reduction, chunk_scale) if foreign else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Factor:
    """Weights of positions by the teacher's certainty, with mean 1 over the step."""

    weighting: TokenWeighting
    vocab_size: int
    scale: float = 1.0

    def sums(self, scored: Sequence[ScoredExample], reduction: Reduction) -> tuple[float, float]:
        """Sums of factors and of weights, over the targets of `scored` that have distributions."""
        total = denominator = 0.0
        for each in scored:
            if each.answer is not None:
                at = np.flatnonzero(each.example.mask)
                total += float(self.compute(each, at).sum()) * _weight(len(at), reduction)
                denominator += len(at) * _weight(len(at), reduction)
        return total, denominator

    def scaled(self, total: float, denominator: float) -> Factor:
        """The same with mean 1, given the `sums` over the whole step."""
        return replace(self, scale=denominator / total if total > 0 else 1.0)

    def compute(self, scored: ScoredExample, at: np.ndarray) -> np.ndarray:
        """float32 [n]: the factors of the targets `at` of a sequence with distributions."""
        assert scored.answer is not None
        entropies = entropy(scored.answer, at - scored.answer.start)
        factors = self.scale * token_factor(entropies, self.weighting, self.vocab_size)
        return factors.astype(np.float32)


def total_weight(examples: Sequence[Example], reduction: Reduction) -> float:
    """The denominator of a step: the sum of its targets' weights."""
    return float(sum(example.num_targets * _weight(example.num_targets, reduction) for example in examples))


def chunk_sums(scored: Sequence[ScoredExample], reduction: Reduction) -> tuple[float, float]:
    """Sums of the weights of targets and of chunks, over the sequences that are compared by chunks.

    Chunks whose weights are multiplied with the first over the second, of a whole step, give a mean over chunks.
    """
    foreign = [
        (each.example, each.example.aligned.chunks.number)
        for each in scored
        if each.answer is not None and each.example.aligned is not None
    ]
    of_chunks = float(sum(number * _weight(number, reduction) for _, number in foreign))
    return total_weight([example for example, _ in foreign], reduction), of_chunks


def _weight(num_targets: int, reduction: Reduction) -> float:
    """Weight of each target of a sequence: the weights of a step sum to its tokens, or to its sequences."""
    return 1.0 if reduction == "token_mean" else 1.0 / num_targets


@dataclass(frozen=True, kw_only=True, slots=True)
class _ModelInputs:
    """Inputs of the model, and the outputs that predict targets; as in MicroBatch."""

    input_ids: np.ndarray
    attention_mask: np.ndarray | None = None
    position_ids: np.ndarray | None = None
    columns: np.ndarray
    picks: np.ndarray


def _padded(scored: Sequence[ScoredExample], positions: Sequence[np.ndarray]) -> _ModelInputs:
    longest = max(len(each.example.token_ids) for each in scored)
    input_ids = np.zeros((len(scored), longest), np.int64)
    attention_mask = np.zeros_like(input_ids)
    for row, each in enumerate(scored):
        length = len(each.example.token_ids)
        input_ids[row, :length] = each.example.token_ids
        attention_mask[row, :length] = 1
    columns = np.unique(np.concatenate(positions)) - 1
    picks = [
        row * len(columns) + np.searchsorted(columns, targets - 1) for row, targets in enumerate(positions)
    ]
    return _ModelInputs(
        input_ids=input_ids,
        attention_mask=attention_mask,
        columns=columns,
        picks=np.concatenate(picks).astype(np.int64),
    )


def _packed(scored: Sequence[ScoredExample], positions: Sequence[np.ndarray]) -> _ModelInputs:
    lengths = [len(each.example.token_ids) for each in scored]
    begins = np.cumsum([0, *lengths[:-1]])
    columns = [begin + at - 1 for begin, at in zip(begins, positions, strict=True)]
    return _ModelInputs(
        input_ids=np.concatenate([each.example.token_ids for each in scored]).astype(np.int64)[None],
        position_ids=np.concatenate([np.arange(length) for length in lengths])[None],
        columns=np.concatenate(columns),
        picks=np.arange(sum(len(at) for at in positions)),
    )


def _targets(
    scored: Sequence[ScoredExample],
    positions: Sequence[np.ndarray],
    device: torch.device,
    form: TargetForm,
    temperature: float,
) -> SparseTargets:
    found: list[TargetRows] = []
    log_partition: list[np.ndarray] = []
    for each, at in zip(scored, positions, strict=True):
        answer = each.answer
        assert answer is not None
        rows = at - answer.start
        found.append(
            target_rows(answer, rows, form, temperature=temperature, draw_logprobs=each.draw_logprobs)
        )
        if answer.log_partitions is not None and answer.log_partitions.shape[1]:
            log_partition.append(answer.log_partitions[rows, 0])
    widest = max(each.token_ids.shape[1] for each in found)
    shares = [each.draw_shares for each in found if each.draw_shares is not None]
    if 0 < len(log_partition) < len(scored):
        raise StillhouseError(
            Reason.TENSOR_INVALID, "The teacher sent log_partitions for some sequences only; see its log."
        )

    def joined(arrays: Sequence[np.ndarray], dtype: type, filling: float = 0.0) -> Tensor:
        return torch.from_numpy(_stacked(arrays, widest, dtype, filling)).unsqueeze(0).to(device)

    return SparseTargets(
        token_ids=joined([each.token_ids for each in found], np.int64, PAD_ID),
        logprobs=joined([each.logprobs for each in found], np.float32, -np.inf),
        log_tail=joined([each.log_tail for each in found], np.float32),
        log_partition=joined(log_partition, np.float32) if log_partition else None,
        draw_shares=joined(shares, np.float32) if shares else None,
    )


def _chunks(
    scored: Sequence[ScoredExample],
    positions: Sequence[np.ndarray],
    device: torch.device,
    reduction: Reduction,
    scale: float,
) -> ChunkTargets:
    chunk_of, logprobs, weights, before = [], [], [], 0
    for each, at in zip(scored, positions, strict=True):
        foreign, answer = each.example.aligned, each.answer
        assert foreign is not None
        assert answer is not None
        number = foreign.chunks.number
        own = foreign.chunks.student[at].astype(np.int64)
        chunk_of.append(np.where(own < 0, -1, own + before))
        logprobs.append(foreign.logprobs(answer.target_logprobs))
        weights.append(np.full(number, scale * _weight(number, reduction)))
        before += number
    return ChunkTargets(
        chunk_of=torch.from_numpy(np.concatenate(chunk_of)).unsqueeze(0).to(device),
        teacher_logprobs=torch.from_numpy(np.concatenate(logprobs)).to(device),
        weights=torch.from_numpy(np.concatenate(weights)).to(device),
    )


def _states(
    scored: Sequence[ScoredExample],
    positions: Sequence[np.ndarray],
    inputs: _ModelInputs,
    weights: Sequence[np.ndarray],
    device: torch.device,
) -> StateTargets | None:
    """States of the tokens before targets, which predict them."""
    found = []
    for each, at in zip(scored, positions, strict=True):
        states = None if each.answer is None else sent_states(each.answer)
        if states is None or each.answer is None:
            return None
        found.append(states[at - each.answer.start])
    num_columns, length = len(inputs.columns), inputs.input_ids.shape[1]
    places = inputs.picks // num_columns * length + inputs.columns[inputs.picks % num_columns]
    return StateTargets(
        states=torch.from_numpy(np.concatenate(found)).to(device),
        places=torch.from_numpy(places.astype(np.int64)).to(device),
        weights=torch.from_numpy(np.concatenate(weights)).to(device),
    )


def sent_states(answer: Distributions) -> np.ndarray | None:
    """float32 [T, D, H]: the hidden states of an answer; None if it has none."""
    if answer.layer_states is not None or answer.hidden_states is None:
        return answer.layer_states
    return answer.hidden_states[:, None]


def _optional(array: np.ndarray | None, device: torch.device) -> Tensor | None:
    return None if array is None else torch.from_numpy(array).to(device)


def _stacked(arrays: Sequence[np.ndarray], num_columns: int, dtype: type, filling: float) -> np.ndarray:
    """[N, num_columns] of arrays [T, K], which may have fewer columns, or [N] of arrays [T]: sequences may have supports of different
    sizes. Each number is copied once."""
    columns = (num_columns,) * (arrays[0].ndim - 1)
    stacked: np.ndarray = np.empty((sum(len(each) for each in arrays), *columns), dtype)
    first = 0
    for each in arrays:
        rows = stacked[first : first + len(each)]
        first += len(each)
        if each.ndim == 1:
            rows[:] = each
        else:
            rows[:, : each.shape[1]] = each
            rows[:, each.shape[1] :] = filling
    return stacked


def _sampled(
    scored: Sequence[ScoredExample],
    positions: Sequence[np.ndarray],
    device: torch.device,
    max_importance_weight: float,
) -> SampledTokens | None:
    teacher, behaviour, baseline = [], [], []
    for each, at in zip(scored, positions, strict=True):
        if each.behaviour_logprobs is None or each.answer is None:
            return None
        teacher.append(each.answer.target_logprobs[at - each.answer.start])
        behaviour.append(each.behaviour_logprobs[at - each.example.start])
        own = np.zeros_like(each.behaviour_logprobs) if each.baseline is None else each.baseline
        baseline.append(own[at - each.example.start])
    return SampledTokens(
        teacher_logprobs=torch.from_numpy(np.concatenate(teacher)).unsqueeze(0).to(device),
        behaviour_logprobs=torch.from_numpy(np.concatenate(behaviour)).unsqueeze(0).to(device),
        max_importance_weight=max_importance_weight,
        baseline=torch.from_numpy(np.concatenate(baseline)).unsqueeze(0).to(device),
    )
