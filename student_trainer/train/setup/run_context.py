"""Last stage of set-up: one frozen context with all that the training loop uses."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import structlog
import torch

from stillhouse.student_trainer.train.checkpointing.best import BestCheckpoint
from stillhouse.student_trainer.train.checkpointing.checkpoint import Progress, TrainingState
from stillhouse.student_trainer.train.checkpointing.checkpointer import Checkpointer
from stillhouse.student_trainer.train.checkpointing.triggers import Triggers
from stillhouse.student_trainer.train.contexts.source import StepSource
from stillhouse.student_trainer.train.evaluation.example_files import ExampleFiles
from stillhouse.student_trainer.train.evaluation.run_report import RunReport
from stillhouse.student_trainer.train.setup.feeds import FeedFactory
from stillhouse.student_trainer.train.setup.hidden_layers import RULE_FACT, recorded_rule
from stillhouse.student_trainer.train.setup.inputs import Inputs
from stillhouse.student_trainer.train.setup.scope import RunScope
from stillhouse.student_trainer.train.setup.student_side import StudentSide
from stillhouse.student_trainer.train.setup.task import RunEvaluator, task_of
from stillhouse.student_trainer.train.setup.teacher_side import TeacherSide
from stillhouse.student_trainer.train.student.device import precision_of
from stillhouse.student_trainer.train.student.export import try_export
from stillhouse.student_trainer.train.student.identity import STUDENT_FACT, check_same_student, identity_of

log = structlog.get_logger()

_DATA_FACT = "data_digests"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunContext:
    """A run, ready to take steps."""

    scope: RunScope
    state: TrainingState
    teacher_side: TeacherSide
    student_side: StudentSide
    source: StepSource
    triggers: Triggers
    checkpointer: Checkpointer
    best: BestCheckpoint
    evaluator: RunEvaluator
    report: RunReport
    examples: ExampleFiles

    def runtime_metrics(self) -> dict[str, float]:
        """Present values by metric name: outstanding teacher requests, failures, cache hits, GPU memory."""
        found = self.teacher_side.teachers.metrics()
        device = self.student_side.accelerator.device
        if device.type == "cuda":
            found["device/memory_bytes"] = float(torch.cuda.memory_reserved(device))
            found["device/memory_peak_bytes"] = float(torch.cuda.max_memory_allocated(device))
        return found


def set_up(scope: RunScope, progress: Progress) -> RunContext:
    """Reads the data, reaches teachers, loads the student and its last checkpoint; what fails fastest comes first.

    `progress` becomes that of the checkpoint. Raises Stopped, or StillhouseError for all that a user can cause.
    """
    attempt = scope.attempt
    inputs = Inputs.load(scope)
    teacher_side = TeacherSide.connect(scope, inputs)
    config = teacher_side.config
    scope = replace(scope, config=config)
    student_side = StudentSide.load(scope, inputs, teacher_side)
    if scope.ranks.is_first:
        try_export(student_side.student, scope.run_dir)

    state = TrainingState(
        student=student_side.student,
        optimizer=student_side.optimizer,
        scaler=student_side.accelerator.scaler,
        progress=progress,
    )
    triggers = Triggers(config.checkpoint, config.evaluation, student_side.schedule)
    checkpointer = Checkpointer(attempt, scope.ranks, state, triggers, keep=config.checkpoint.keep)
    student = student_side.student
    identity = identity_of(student.plain, student.model)
    checkpointer.restore(student.trainable_parameters().values())
    check_same_student(checkpointer.kept_fact(STUDENT_FACT), identity, config.student.model)
    source = FeedFactory(
        scope=scope, inputs=inputs, teacher_side=teacher_side, student_side=student_side, state=state
    ).open_source()
    source.begin(progress.step)
    digests = " ".join(inputs.corpus.digests)
    if checkpointer.kept_fact(_DATA_FACT) not in (None, digests):
        log.warning(
            "the rows are others than those that this run began with: from here on their order and number are new"
        )
    best = BestCheckpoint(config.evaluation.best_metric, checkpointer, scope.run_dir)
    matmul_dtype = checkpointer.agree_matmul_dtype(config, student_side.accelerator)
    student_side.stepper.multiply_in(matmul_dtype)
    checkpointer.record(
        {
            "config_sha256": hashlib.sha256(attempt.run_dir.effective_spec_path.read_bytes()).hexdigest(),
            "tokenizer_fingerprint": inputs.tokenizer_fingerprint,
            "teacher_fingerprint": teacher_side.teachers.fingerprint,
            "matmul_dtype": matmul_dtype or "",
            STUDENT_FACT: identity,
            _DATA_FACT: digests,
            RULE_FACT: recorded_rule(config, scope.run_dir),
        }
    )
    scope.reporter.resume_at(progress.step)
    total_steps = student_side.schedule.total_steps
    attempt.report("started", total_steps=total_steps, step=progress.step)
    precision = precision_of(student_side.accelerator)
    log.info("training", step=progress.step, total_steps=total_steps, precision=precision)

    evaluator = task_of(config).make_evaluator(scope, inputs, teacher_side, student_side)
    return RunContext(
        scope=scope,
        state=state,
        teacher_side=teacher_side,
        student_side=student_side,
        source=source,
        triggers=triggers,
        checkpointer=checkpointer,
        best=best,
        evaluator=evaluator,
        report=RunReport(attempt, evaluator.generation),
        examples=ExampleFiles(attempt, inputs.tokenizer, from_cache=config.is_offline),
    )
