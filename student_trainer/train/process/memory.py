"""Exhausted memory, told from other errors whichever library raised it, and reported with the work that needed it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.student_trainer.config.micro_batch import MEMORY_ADVICE

_PHRASES = (
    "out of memory",  # CUDA, MPS, NCCL
    "allocate memory",  # "DefaultCPUAllocator: can't allocate memory", "Cannot allocate memory" of mmap
    "not enough memory",  # DefaultCPUAllocator where posix_memalign is missing
    "std::bad_alloc",
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
)
"""Parts of the messages of libraries that raise a plain RuntimeError, or one of their own, for exhausted memory."""
_MAX_CAUSE_CHARS = 300


def is_exhausted(error: BaseException) -> bool:
    """True if exhausted memory caused the error, directly or below the types of other libraries."""
    return cause_of(error) is not None


def cause_of(error: BaseException) -> BaseException | None:
    """The error of exhausted memory among `error` and its causes."""
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        if isinstance(here, StillhouseError):
            found = here.reason is Reason.OUT_OF_MEMORY
        else:
            told = isinstance(here, MemoryError) or getattr(here, "errno", None) == errno.ENOMEM
            found = told or any(phrase in str(here) for phrase in _PHRASES)
        if found:
            return here
        here = here.__cause__ or here.__context__
    return None


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
        cause = cause_of(error)
        if cause is None or isinstance(cause, StillhouseError):
            raise
        raise out_of_memory(cause, work()) from error
