"""Third stage of set-up: the student on its device, its optimizer, and the steps that it will take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.rules.cross_tokenizer import is_bridged
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.data.schedule import Schedule
from stillhouse.student_trainer.train.optim import make_optimizer
from stillhouse.student_trainer.train.setup.inputs import Inputs
from stillhouse.student_trainer.train.setup.scope import RunScope
from stillhouse.student_trainer.train.setup.task import task_of
from stillhouse.student_trainer.train.setup.teacher_side import TeacherSide
from stillhouse.student_trainer.train.step import Stepper
from stillhouse.student_trainer.train.student import device
from stillhouse.student_trainer.train.student.hidden_term import make_projections
from stillhouse.student_trainer.train.student.student import Student


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentSide:
    """The student and all that trains it."""

    student: Student
    accelerator: Any
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    vocab_size: int
    """Effective vocabulary: the ids that student and teacher both know."""
    stepper: Stepper

    @classmethod
    def load(cls, scope: RunScope, inputs: Inputs, teacher_side: TeacherSide) -> StudentSide:
        """Loads the student with its first weights. Raises StillhouseError."""
        config, corpus = scope.config, teacher_side.corpus
        accelerator = device.make_accelerator(config.optimizer)
        task = task_of(config)
        student = task.load_student(scope, inputs.tokenizer, teacher_side, accelerator)
        check_length(corpus, student)
        vocab_size = len(inputs.tokenizer)
        if not is_bridged(config):
            vocab_size = teacher_side.teachers.shared_vocab_size(vocab_size)
        weights = [each.weight for each in config.data.train if each.weight is not None]
        schedule = Schedule.from_config(
            len(corpus.train), config.optimizer, config.data.seed, corpus.dataset_sizes, weights
        )
        student.projections = make_projections(config, student, teacher_side.teachers.hidden_size)
        optimizer = make_optimizer(student.trainable_parameters(), config.optimizer)
        stepper = task.make_stepper(
            scope,
            teacher_side,
            student,
            optimizer,
            accelerator,
            total_steps=schedule.total_steps,
            vocab_size=vocab_size,
        )
        return cls(
            student=student,
            accelerator=accelerator,
            optimizer=optimizer,
            schedule=schedule,
            vocab_size=vocab_size,
            stepper=stepper,
        )


def check_length(corpus: Corpus, student: Student) -> None:
    """Raises StillhouseError(SEQUENCE_TOO_LONG) for an example that is longer than the student's positions."""
    longest, limit = corpus.longest, student.max_positions
    if limit is not None and len(longest.token_ids) > limit:
        raise StillhouseError(
            Reason.SEQUENCE_TOO_LONG,
            f"{longest.place} has {len(longest.token_ids)} tokens; the student was made for at most {limit}. "
            f"Set data.max_sequence_tokens: {limit}.",
            metadata={"value": str(len(longest.token_ids)), "limit": str(limit)},
        )
