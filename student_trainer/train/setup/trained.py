"""Set-up of an attempt that only exports: an earlier one has taken every step, and its export failed or was cut off."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import structlog

from stillhouse.student_trainer.run_dir import TrainedRecord
from stillhouse.student_trainer.train.checkpointing import checkpoint
from stillhouse.student_trainer.train.setup.scope import RunScope
from stillhouse.student_trainer.train.setup.task import task_of
from stillhouse.student_trainer.train.student import device
from stillhouse.student_trainer.train.student.student import Student, load_tokenizer

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """A student after its last step."""

    student: Student
    step: int
    """Steps that were taken."""


def load_trained(scope: RunScope) -> Trained | None:
    """Loads the student that training ended with, without data and teacher; None if steps are left to take.

    Raises StillhouseError, as `Student.load` does.
    """
    own = _whole_record(scope) if scope.ranks.is_first else None
    told = scope.ranks.exchange(own and dataclasses.asdict(own), patient=True)[0]
    if told is None:
        return None
    record = TrainedRecord.from_json(told)
    step = record.step
    config = scope.config
    accelerator = device.make_accelerator(config.optimizer)
    tokenizer = load_tokenizer(config.student, scope.data_dir, chat_template=config.data.chat_template)
    student = task_of(config).load_trained(scope, tokenizer, record, accelerator)
    checkpoint.restore_weights(scope.run_dir, step, student.model)
    if scope.ranks.is_first:
        scope.attempt.report("started", total_steps=record.last_step, step=record.last_step)
    log.info("exporting again; every step was taken before", step=step)
    return Trained(student=student, step=record.last_step)


def _whole_record(scope: RunScope) -> TrainedRecord | None:
    record = scope.run_dir.trained()
    if record is None or record.step not in scope.run_dir.checkpoints():
        return None
    return record if checkpoint.find_damage(scope.run_dir.checkpoint_path(record.step)) is None else None
