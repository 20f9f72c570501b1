"""The task of a run: what its rows, its student, its steps and its evaluation are; everything else is the same for all."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from stillhouse.student_trainer.config.rules.cross_tokenizer import chunk_loss, is_bridged
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.train.batching.passes import deal
from stillhouse.student_trainer.train.classification.classes import Classes
from stillhouse.student_trainer.train.classification.evaluator import ClassEvaluator
from stillhouse.student_trainer.train.classification.rows import LabelledExample, load_labelled
from stillhouse.student_trainer.train.classification.stepper import ClassStepper
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.data.evaluation_sets import EvaluationRows, with_sets
from stillhouse.student_trainer.train.evaluation.evaluator import Evaluation, Evaluator
from stillhouse.student_trainer.train.evaluation.example_plan import choose_rows
from stillhouse.student_trainer.train.evaluation.text_writer import TextWriter
from stillhouse.student_trainer.train.setup.data import prepare_corpus
from stillhouse.student_trainer.train.setup.scope import RunScope
from stillhouse.student_trainer.train.step import Stepper
from stillhouse.student_trainer.train.student import device
from stillhouse.student_trainer.train.student.classifier import Classifier, own_class_names
from stillhouse.student_trainer.train.student.student import Student
from stillhouse.student_trainer.train.teacher.target_source import TargetSource

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stillhouse.student_trainer.run_dir import TrainedRecord
    from stillhouse.student_trainer.train.batching.collate import ScoredExample
    from stillhouse.student_trainer.train.setup.inputs import Inputs
    from stillhouse.student_trainer.train.setup.student_side import StudentSide
    from stillhouse.student_trainer.train.setup.teacher_side import TeacherSide


class RunEvaluator(Protocol):
    """Evaluates the student on held-out rows."""

    @property
    def generation(self) -> Mapping[str, Any]:
        """Sampling of text that the student writes; empty if it writes none."""

    def evaluate(self) -> Evaluation:
        """Scores the rows; metrics are empty without held-out rows."""


class Task(Protocol):
    """The parts of a run that depend on what the student computes."""

    def load_corpus(self, scope: RunScope, tokenizer: Any) -> tuple[Corpus, Sequence[EvaluationRows]]:
        """Reads the rows, and the places of evaluation sets among the held-out ones. Raises StillhouseError."""

    def load_student(
        self, scope: RunScope, tokenizer: Any, teacher_side: TeacherSide, accelerator: Any
    ) -> Student:
        """Loads the student with its first weights. Raises StillhouseError."""

    def load_trained(
        self, scope: RunScope, tokenizer: Any, record: TrainedRecord, accelerator: Any
    ) -> Student:
        """Loads the student of a run that has taken every step, for weights of its last checkpoint."""

    def make_stepper(
        self,
        scope: RunScope,
        teacher_side: TeacherSide,
        student: Student,
        optimizer: torch.optim.Optimizer,
        accelerator: Any,
        *,
        total_steps: int,
        vocab_size: int,
    ) -> Stepper:
        """The part that takes the run's steps."""

    def make_evaluator(
        self, scope: RunScope, inputs: Inputs, teacher_side: TeacherSide, student_side: StudentSide
    ) -> RunEvaluator:
        """The part that evaluates the student, once the targets of held-out rows are there. Raises Stopped, StillhouseError."""


def task_of(config: RunConfig) -> Task:
    """The task of a run."""
    return Classification() if config.classifies else LanguageModelling()


class LanguageModelling:
    """The student continues text."""

    def load_corpus(self, scope: RunScope, tokenizer: Any) -> tuple[Corpus, Sequence[EvaluationRows]]:
        return with_sets(scope.config, prepare_corpus(scope, tokenizer), tokenizer, scope.data_dir)

    def load_student(
        self, scope: RunScope, tokenizer: Any, teacher_side: TeacherSide, accelerator: Any
    ) -> Student:
        student = _load(scope, tokenizer, accelerator)
        generates = any(context.teacher for context in scope.config.contexts) and not is_bridged(scope.config)
        # Tokens that end texts to learn: in the data, and in what teachers generate.
        ends = [*teacher_side.corpus.end_ids, *(teacher_side.teachers.end_ids if generates else ())]
        student.add_end_ids(dict.fromkeys(ends))
        return student

    def load_trained(
        self, scope: RunScope, tokenizer: Any, record: TrainedRecord, accelerator: Any
    ) -> Student:
        student = _load(scope, tokenizer, accelerator)
        student.add_end_ids(record.end_ids)
        return student

    def make_stepper(
        self,
        scope: RunScope,
        teacher_side: TeacherSide,  # noqa: ARG002
        student: Student,
        optimizer: torch.optim.Optimizer,
        accelerator: Any,
        *,
        total_steps: int,
        vocab_size: int,
    ) -> Stepper:
        return Stepper(
            student,
            optimizer,
            accelerator,
            scope.config,
            total_steps=total_steps,
            vocab_size=vocab_size,
            ranks=scope.ranks,
        )

    def make_evaluator(
        self, scope: RunScope, inputs: Inputs, teacher_side: TeacherSide, student_side: StudentSide
    ) -> Evaluator:
        config, accelerator = scope.config, student_side.accelerator
        rows = teacher_side.held_out.score(scope, teacher_side.teachers)
        places = _own(rows, scope)
        bridged = is_bridged(config)
        # A bridge leaves out held-out rows that it cannot compare; it has no named sets.
        sets = [replace(each, end=len(rows)) for each in inputs.sets] if bridged else inputs.sets
        return Evaluator(
            student=student_side.student,
            head=student_side.stepper.head,
            rows=[rows[place] for place in places],
            places=places,
            num_rows=len(rows),
            sets=sets,
            plan=choose_rows([each.example for each in rows], sets, config.evaluation.examples),
            accelerator=accelerator,
            cut=student_side.stepper.cut,
            vocab_size=student_side.vocab_size,
            writer=TextWriter(
                student_side.student,
                config.evaluation.generation,
                device=accelerator.device,
                autocast=accelerator.autocast,
                vocab_size=student_side.vocab_size,
                seed=config.data.seed,
            ),
            chunk_loss=chunk_loss(config) if bridged else None,
            exchange=partial(scope.ranks.exchange, patient=True),
        )


class Classification:
    """The student tells classes of whole texts, or pairs of texts, apart."""

    def load_corpus(self, scope: RunScope, tokenizer: Any) -> tuple[Corpus, Sequence[EvaluationRows]]:
        return load_labelled(scope.config, tokenizer, scope.data_dir)

    def load_student(
        self, scope: RunScope, tokenizer: Any, teacher_side: TeacherSide, accelerator: Any
    ) -> Student:
        own = own_class_names(scope.config.student, scope.data_dir)
        classes = _settle(scope, own, teacher_side.teachers)
        classes.check((*teacher_side.corpus.train, *teacher_side.corpus.eval))
        return _load_classifier(scope, tokenizer, classes.names, accelerator)

    def load_trained(
        self, scope: RunScope, tokenizer: Any, record: TrainedRecord, accelerator: Any
    ) -> Student:
        return _load_classifier(scope, tokenizer, record.class_names, accelerator)

    def make_stepper(
        self,
        scope: RunScope,
        teacher_side: TeacherSide,
        student: Student,
        optimizer: torch.optim.Optimizer,
        accelerator: Any,
        *,
        total_steps: int,
        vocab_size: int,  # noqa: ARG002 (of tokens)
    ) -> Stepper:
        return ClassStepper(
            student,
            optimizer,
            accelerator,
            scope.config,
            total_steps=total_steps,
            ranks=scope.ranks,
            classes=_settle(scope, student.class_names, teacher_side.teachers),
            is_labelled=_is_labelled(teacher_side.corpus),
        )

    def make_evaluator(
        self,
        scope: RunScope,
        inputs: Inputs,
        teacher_side: TeacherSide,
        student_side: StudentSide,
    ) -> ClassEvaluator:
        student = student_side.student
        rows = teacher_side.held_out.score(scope, teacher_side.teachers, student.class_names)
        places = _own(rows, scope)
        return ClassEvaluator(
            student=student,
            classes=_settle(scope, student.class_names, teacher_side.teachers),
            rows=[rows[place] for place in places],
            places=places,
            num_rows=len(rows),
            sets=inputs.sets,
            is_labelled=_is_labelled(teacher_side.corpus),
            accelerator=student_side.accelerator,
            cut=student_side.stepper.cut,
            exchange=partial(scope.ranks.exchange, patient=True),
        )


def _own(rows: Sequence[ScoredExample], scope: RunScope) -> list[int]:
    """Places of the held-out rows of this process."""
    return deal([len(each.example.token_ids) for each in rows], scope.ranks.size)[scope.ranks.rank]


def _load(scope: RunScope, tokenizer: Any, accelerator: Any) -> Student:
    config = scope.config
    return Student.load(
        config.student,
        tokenizer,
        data_dir=scope.data_dir,
        device=accelerator.device,
        precision=device.precision_of(accelerator),
        seed=config.optimizer.seed,
    )


def _load_classifier(
    scope: RunScope, tokenizer: Any, class_names: Sequence[str], accelerator: Any
) -> Classifier:
    config = scope.config
    return Classifier.load_with_classes(
        config.student,
        tokenizer,
        class_names,
        data_dir=scope.data_dir,
        device=accelerator.device,
        precision=device.precision_of(accelerator),
        seed=config.optimizer.seed,
    )


def _settle(scope: RunScope, own: Sequence[str], teachers: TargetSource) -> Classes:
    return Classes.settle(scope.config.data.classes, own, teachers.class_names)


def _is_labelled(corpus: Corpus) -> bool:
    first = corpus.train[0]
    assert isinstance(first, LabelledExample), "a classifier's rows"
    return first.label is not None
