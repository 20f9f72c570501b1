"""Collates a classifier's rows and teachers' class distributions into the tensors of one forward pass.

Axes: B rows, L tokens after padding, C classes. To the losses the rows are the positions of one sequence, [1, B], and the
classes its vocabulary, all of which the teacher sends: there is no tail.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.student_trainer.train.batching.collate import MicroBatch, ScoredExample, StateTargets
from stillhouse.student_trainer.train.classification.classes import Classes
from stillhouse.student_trainer.train.classification.rows import LabelledExample
from stillhouse.student_trainer.train.loss.objective import Positions
from stillhouse.student_trainer.train.loss.sparse import SparseTargets


def collate_classes(
    scored: Sequence[ScoredExample],
    classes: Classes,
    *,
    device: torch.device,
    pad_id: int,
    temperature: float = 1.0,
) -> MicroBatch:
    """The micro-batch of `scored`, of which all or none have a teacher's classes.

    A row without a label has class 0 as its target, which no loss may count. `temperature` is that of the loss.
    """
    num_rows = len(scored)
    longest = max(len(each.example.token_ids) for each in scored)
    input_ids = np.full((num_rows, longest), pad_id, np.int64)
    attention_mask = np.zeros((num_rows, longest), np.int64)
    types = np.zeros((num_rows, longest), np.int64)
    for row, each in enumerate(scored):
        length = len(each.example.token_ids)
        input_ids[row, :length] = each.example.token_ids
        attention_mask[row, :length] = 1
        own = each.example.token_type_ids
        if own is not None:
            types[row, :length] = np.resize(own, length)  # a pass that is tried may be longer than its row
    answers = [each.answer for each in scored if each.answer is not None]

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return MicroBatch(
        input_ids=tensor(input_ids),
        attention_mask=tensor(attention_mask),
        position_ids=None,
        columns=tensor(np.zeros(0, np.int64)),
        picks=tensor(np.arange(num_rows)),
        positions=Positions(
            target_ids=tensor(np.array([_target(each, classes) for each in scored], np.int64)).unsqueeze(0),
            weights=torch.ones(1, num_rows, device=device),
            targets=_targets(answers, len(classes.names), device, temperature)
            if len(answers) == num_rows
            else None,
        ),
        token_type_ids=tensor(types) if types.any() else None,
        states=_states(scored, longest, device),
    )


def _states(scored: Sequence[ScoredExample], longest: int, device: torch.device) -> StateTargets | None:
    """States of all tokens; those of a row weigh 1 together, as its classes do."""
    found, places, weights = [], [], []
    for row, each in enumerate(scored):
        states = None if each.answer is None else each.answer.layer_states
        if states is None:
            return None
        length = len(each.example.token_ids)
        found.append(states[0][np.arange(length) % states.shape[1]])  # a pass that is tried may be longer
        places.append(row * longest + np.arange(length))
        weights.append(np.full(length, 1 / length, np.float32))
    return StateTargets(
        states=torch.from_numpy(np.concatenate(found)).to(device),
        places=torch.from_numpy(np.concatenate(places)).to(device),
        weights=torch.from_numpy(np.concatenate(weights)).to(device),
    )


def _target(scored: ScoredExample, classes: Classes) -> int:
    example = scored.example
    assert isinstance(example, LabelledExample), "a classifier's rows"
    return 0 if example.label is None else classes.index(example.label)


def _targets(
    answers: Sequence[Distributions], num_classes: int, device: torch.device, temperature: float
) -> SparseTargets:
    logprobs = torch.from_numpy(np.stack([dense_logprobs(each, num_classes) for each in answers]))
    wide = logprobs.double()
    partition = (wide / temperature).logsumexp(-1)
    num_rows = len(answers)
    return SparseTargets(
        token_ids=torch.arange(num_classes, device=device).expand(1, num_rows, -1),
        logprobs=logprobs.unsqueeze(0).to(device),
        log_tail=torch.full((1, num_rows), -torch.inf, device=device),
        log_partition=partition.float().unsqueeze(0).to(device),
    )


def dense_logprobs(row: Distributions, num_classes: int) -> np.ndarray:
    """float32 [C]: the log-probabilities of a class row, whose classes may stand in any order."""
    logprobs = np.full(num_classes, -np.inf, np.float32)
    known = row.token_ids[-1] >= 0  # a mixture of teachers pads
    logprobs[row.token_ids[-1][known]] = row.logprobs[-1][known]
    return logprobs
