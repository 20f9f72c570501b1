"""The term of the objective that compares hidden states of student and teacher, and its learnt projections."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.student_trainer.config.checks import invalid_field
from stillhouse.student_trainer.config.rules.contexts import run_losses
from stillhouse.student_trainer.config.schema import LayerPairConfig, LossConfig, RunConfig
from stillhouse.student_trainer.config.settled.layer_pairs import teacher_layers
from stillhouse.student_trainer.train.batching.collate import MicroBatch, StateTargets
from stillhouse.student_trainer.train.loss.hidden import hidden_mse
from stillhouse.student_trainer.train.loss.objective import ObjectiveSum
from stillhouse.student_trainer.train.student.student import Student

_PROJECTION_STREAM = 7
"""Separates the first values of projections from other random numbers of the run."""


def make_projections(config: RunConfig, student: Student, teacher_width: int) -> nn.ParameterDict:
    """A matrix [H, S] for each pair of layers that the run compares, by `_name`; none where both sides are equally wide.

    Its first values are uniform in +-1/sqrt(S), from the seed of the run and the pair alone.
    """
    projections = nn.ParameterDict()
    pairs = {
        pair
        for _, loss in run_losses(config)
        if loss.hidden_mse is not None and loss.compares_hidden
        for pair in loss.hidden_mse.layers
    }
    width = int(getattr(student.plain.config.get_text_config(), "hidden_size", 0))
    if not pairs or width == teacher_width:
        return projections
    if not width:
        raise invalid_field(
            "loss.hidden_mse",
            f"needs the student's width, which {student.config.model} does not tell (hidden_size). Leave it out.",
        )
    device = next(student.model.parameters()).device
    for pair in sorted(pairs, key=_name):
        made = torch.empty(teacher_width, width)
        seeds = np.random.SeedSequence([config.optimizer.seed, _PROJECTION_STREAM, *_layers(pair)])
        generator = torch.Generator().manual_seed(int(seeds.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        made.uniform_(-(width**-0.5), width**-0.5, generator=generator)
        projections[_name(pair)] = nn.Parameter(made.to(device))
    return projections


def add_hidden_mse(
    summed: ObjectiveSum,
    student: Student,
    states: Sequence[Tensor],
    batch: MicroBatch,
    *,
    loss: LossConfig,
    hidden: Tensor | None = None,
) -> ObjectiveSum:
    """Adds the term of `loss.hidden_mse`: the mean over its pairs of layers.

    `states` are the student's before its first layer and after each, [B, L, H]; `hidden` [N, H], of the targets, stands for the
    last one where the output layer reads another. Raises StillhouseError(INVALID_SPEC) for a student that does not show them.
    """
    targets, compared = batch.states, loss.hidden_mse
    if compared is None or targets is None or not loss.compares_hidden:
        return summed
    layers = teacher_layers(loss)
    terms = []
    for pair in compared.layers:
        assert pair.teacher is not None, "pairs are checked"
        ours = hidden if hidden is not None and pair.student == len(states) - 1 else None
        if ours is None:
            ours = _picked(states, pair, targets, student)
        terms.append(
            hidden_mse(
                ours,
                targets.states[:, layers.index(pair.teacher)],
                targets.weights,
                projection=student.projections.get(_name(pair)),
                normalise=compared.normalise,
            )
        )
    term = torch.stack(terms).mean()
    return ObjectiveSum(
        loss_sum=summed.loss_sum + compared.weight * term,
        parts={**summed.parts, "hidden_mse": term.detach()},
    )


def _picked(
    states: Sequence[Tensor], pair: LayerPairConfig, targets: StateTargets, student: Student
) -> Tensor:
    """[M, S]: the student's states after a layer, at the tokens of the teacher's."""
    depth = student.plain.config.get_text_config().num_hidden_layers
    if len(states) != depth + 1 or pair.student is None:
        raise invalid_field(
            "loss.hidden_mse",
            f"needs the states of {depth} layers, of which {student.config.model} shows {max(0, len(states) - 1)}. Leave it out.",
        )
    return states[pair.student].flatten(0, 1).index_select(0, targets.places)


def _name(pair: LayerPairConfig) -> str:
    return f"student_{pair.student}_teacher_{pair.teacher}"


def _layers(pair: LayerPairConfig) -> tuple[int, int]:
    """The layers of student and teacher."""
    assert pair.teacher is not None, "pairs are checked"
    assert pair.student is not None, "pairs are checked"
    return pair.student, pair.teacher
