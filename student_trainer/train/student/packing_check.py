"""Checks that a model keeps packed sequences apart: several in one row of a micro-batch.

Positions restart with each sequence, and the model must mask attention there; a trial batch tests it.
"""

from __future__ import annotations

import numpy as np
import torch

from stillhouse.student_trainer.config.checks import invalid_field
from stillhouse.student_trainer.train.batching.collate import ScoredExample, collate
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.student.student import Student, evaluation_mode

MAX_DIFFERENCE = 0.02
"""Largest difference of logits, packed against alone, as a share of their spread; bfloat16 rounding stays below it."""


def check_packing(student: Student, device: torch.device) -> None:
    """Returns if the student computes the same logits for packed sequences as for single ones.

    Raises StillhouseError(INVALID_SPEC) if its attention or state leaks from one sequence into the next.
    """
    size = student.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]  # of transformers' models
    generator = np.random.default_rng(0)
    scored = [
        ScoredExample(
            example=Example(
                token_ids=generator.integers(0, size, length).astype(np.int32),
                mask=np.arange(length) > 0,
                place="a trial sequence",
            ),
            answer=None,
        )
        for length in (5, 3, 6)
    ]
    with evaluation_mode(student.model), torch.no_grad():
        packed, apart = (
            student.logits(collate(scored, reduction="token_mean", device=device, packing=packing)).float()
            for packing in (True, False)
        )
    if (packed - apart).abs().max() > MAX_DIFFERENCE * apart.std():
        description = (
            f"{student.config.model} mixes sequences packed into one row: its logits differ from those of the sequences "
            "alone. Leave data.packing out."
        )
        raise invalid_field("data.packing", description)
