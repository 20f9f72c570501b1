"""Packed micro-batches: sequences one behind the other in a single row, which a model must not mix.

Positions start again with each sequence, and attention is cut there by the model. That it is, is tried out.
"""

from __future__ import annotations

import numpy as np
import torch

from stillhouse.student_trainer.config.checks import invalid_field
from stillhouse.student_trainer.train.batching.collate import ScoredExample, collate
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.student.student import Student

MAX_DIFFERENCE = 0.02
"""Between logits of a sequence alone and packed, as a share of their spread: what rounding explains in bfloat16."""


def check_packing(student: Student, device: torch.device) -> None:
    """Return if the student reads packed sequences as it reads them one by one.

    Raises StillhouseError(INVALID_SPEC): its attention, or its state, runs from one sequence into the next.
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
    was_training = student.model.training
    student.model.eval()
    try:
        with torch.no_grad():
            packed, apart = (
                student.logits(
                    collate(scored, reduction="token_mean", device=device, packing=packing)
                ).float()
                for packing in (True, False)
            )
    finally:
        student.model.train(was_training)
    if (packed - apart).abs().max() > MAX_DIFFERENCE * apart.std():
        description = (
            f"{student.config.model} mixes sequences that lie in one row: its logits differ from those of the sequences "
            "apart. Leave data.packing out."
        )
        raise invalid_field("data.packing", description)
