"""Errors of the catalog for causes that a user can remedy, whichever library raised them."""

from __future__ import annotations

from pathlib import Path

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.disk_errors import is_broken, is_full, is_too_long
from stillhouse.protos.library_errors import memory_cause
from stillhouse.student_trainer.disk_errors import broken_sentence, full_sentence, too_long_sentence
from stillhouse.student_trainer.train.process.memory import out_of_memory


def explain(error: BaseException, run_path: Path) -> BaseException:
    """The error of the catalog for a cause that a user can remedy; else `error` itself."""
    if is_too_long(error):
        return StillhouseError(Reason.DISK_FULL, too_long_sentence(run_path))
    if is_full(error):
        return StillhouseError(Reason.DISK_FULL, full_sentence(run_path))
    if is_broken(error):
        return StillhouseError(Reason.CHECKPOINT_CORRUPT, broken_sentence(run_path, error))
    exhausted = memory_cause(error)
    if exhausted is None or isinstance(exhausted, StillhouseError):
        return exhausted or error
    return out_of_memory(exhausted)
