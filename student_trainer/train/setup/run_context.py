"""Last stage of set-up: one frozen context with all that the training loop uses."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import structlog

from stillhouse.student_trainer.config.rules.cross_tokenizer import chunk_loss, is_bridged
from stillhouse.student_trainer.train.checkpointing.checkpoint import Progress, TrainingState
from stillhouse.student_trainer.train.checkpointing.checkpointer import Checkpointer
from stillhouse.student_trainer.train.checkpointing.matmul_dtype import kept_matmul_dtype
from stillhouse.student_trainer.train.checkpointing.triggers import Triggers
from stillhouse.student_trainer.train.contexts.source import StepSource
from stillhouse.student_trainer.train.data.schedule import Schedule
from stillhouse.student_trainer.train.evaluate import Evaluator
from stillhouse.student_trainer.train.runtime_metrics import runtime_metrics
from stillhouse.student_trainer.train.setup.feeds import FeedFactory
from stillhouse.student_trainer.train.setup.inputs import Inputs
from stillhouse.student_trainer.train.setup.scope import RunScope
from stillhouse.student_trainer.train.setup.student_side import StudentSide
from stillhouse.student_trainer.train.setup.teacher_side import TeacherSide
from stillhouse.student_trainer.train.step import Stepper
from stillhouse.student_trainer.train.student.device import precision_of
from stillhouse.student_trainer.train.student.student import Student

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """A run, ready to take steps."""

    scope: RunScope
    state: TrainingState
    student: Student
    stepper: Stepper
    schedule: Schedule
    source: StepSource
    triggers: Triggers
    checkpointer: Checkpointer
    evaluator: Evaluator
    runtime_metrics: Callable[[], Mapping[str, float]]

    @property
    def progress(self) -> Progress:
        """Steps taken so far; the stepper moves it on."""
        return self.state.progress


def set_up(scope: RunScope, progress: Progress) -> RunContext:
    """Reads the data, reaches teachers, loads the student and its last checkpoint; what fails fastest comes first.

    `progress` becomes that of the checkpoint. Raises Stopped, or StillhouseError for all that a user can cause.
    """
    config, attempt = scope.config, scope.attempt
    inputs = Inputs.load(scope)
    teacher_side = TeacherSide.connect(scope, inputs)
    student_side = StudentSide.load(scope, inputs, teacher_side)

    state = TrainingState(
        model=student_side.student.model,
        optimizer=student_side.optimizer,
        scaler=student_side.accelerator.scaler,
        progress=progress,
    )
    triggers = Triggers(config.checkpoint, config.evaluation, student_side.schedule)
    checkpointer = Checkpointer(attempt, scope.ranks, state, triggers, keep=config.checkpoint.keep)
    restored_step = checkpointer.restore(student_side.student.trainable_parameters().values())
    matmul_dtype = _agree_matmul_dtype(scope, student_side, restored_step)
    student_side.stepper.multiply_in(matmul_dtype)
    checkpointer.record(
        {
            "config_sha256": hashlib.sha256(attempt.run_dir.effective_spec_path.read_bytes()).hexdigest(),
            "tokenizer_fingerprint": inputs.tokenizer_fingerprint,
            "teacher_fingerprint": teacher_side.teachers.fingerprint,
            "matmul_dtype": matmul_dtype or "",
        }
    )
    scope.reporter.resume_at(progress.step)
    total_steps = student_side.schedule.total_steps
    attempt.report("started", total_steps=total_steps, step=progress.step)
    precision = precision_of(student_side.accelerator)
    log.info("training", step=progress.step, total_steps=total_steps, precision=precision)

    evaluator = _make_evaluator(scope, teacher_side, student_side)
    source = FeedFactory(
        scope=scope, inputs=inputs, teacher_side=teacher_side, student_side=student_side, state=state
    ).open_source()
    return RunContext(
        scope=scope,
        state=state,
        student=student_side.student,
        stepper=student_side.stepper,
        schedule=student_side.schedule,
        source=source,
        triggers=triggers,
        checkpointer=checkpointer,
        evaluator=evaluator,
        runtime_metrics=partial(runtime_metrics, teacher_side.teachers, student_side.accelerator.device),
    )


def _agree_matmul_dtype(scope: RunScope, student_side: StudentSide, restored_step: int | None) -> str | None:
    """The matmul dtype that the first process finds, for all."""
    kept = None
    if scope.ranks.is_first:
        kept = kept_matmul_dtype(scope.config, scope.attempt, restored_step, student_side.accelerator)
    agreed: str | None = scope.ranks.exchange(kept, patient=True)[0]
    return agreed


def _make_evaluator(scope: RunScope, teacher_side: TeacherSide, student_side: StudentSide) -> Evaluator:
    """Queries the targets of held-out rows, unless an earlier attempt did."""
    rows = teacher_side.held_out.score(scope, teacher_side.teachers)
    return Evaluator(
        student=student_side.student,
        head=student_side.stepper.head,
        rows=[each for number, each in enumerate(rows) if scope.ranks.is_mine(number)],
        num_rows=len(rows),
        accelerator=student_side.accelerator,
        batch_size=scope.config.optimizer.micro_batch_size,
        vocab_size=student_side.vocab_size,
        chunk_loss=chunk_loss(scope.config) if is_bridged(scope.config) else None,
        total=scope.ranks.sum,
    )
