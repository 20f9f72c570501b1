"""Exhausted memory of a training process, reported with the work that needed it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.library_errors import memory_cause
from stillhouse.student_trainer.config.settled.micro_batch import MEMORY_ADVICE

_MAX_CAUSE_CHARS = 300


def out_of_memory(cause: BaseException, work: str = "The training process") -> StillhouseError:
    """The error for exhausted memory; `work` is the subject of its sentence."""
    said = first_line(cause)[:_MAX_CAUSE_CHARS]
    return StillhouseError(Reason.OUT_OF_MEMORY, f"{work} ran out of memory ({said}). {MEMORY_ADVICE}")


@contextmanager
def memory_of(work: Callable[[], str]) -> Iterator[None]:
    """Raises exhausted memory in the block as StillhouseError(OUT_OF_MEMORY) of `work()`, such as "The update of step 3"."""
    try:
        yield
    except Exception as error:
        cause = memory_cause(error)
        if cause is None or isinstance(cause, StillhouseError):
            raise
        raise out_of_memory(cause, work()) from error
