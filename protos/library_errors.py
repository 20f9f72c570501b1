"""Errors of libraries told by their causes, whatever their types: over files, models and templates, and of exhausted memory."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stillhouse.protos.errors import Reason, StillhouseError

_PANIC = "PanicException"
"""Type of a panic of Rust code (tokenizers, safetensors), which is no Exception and may come from several libraries."""
_NO_MEMORY = (
    "out of memory",  # CUDA, MPS, NCCL
    "allocate memory",  # "DefaultCPUAllocator: can't allocate memory", "Cannot allocate memory" of mmap
    "not enough memory",  # DefaultCPUAllocator where posix_memalign is missing
    "std::bad_alloc",
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
)
"""Parts of the messages of libraries that raise a plain RuntimeError, or one of their own, for exhausted memory."""


@contextmanager
def reported_as(report: Callable[[BaseException], StillhouseError]) -> Iterator[None]:
    """Raises what a library raises in the block as `report` of it; an error of the catalog stays as it is."""
    try:
        yield
    except StillhouseError:
        raise
    except BaseException as error:
        if is_failure(error):
            raise report(error) from error
        raise


def is_failure(error: BaseException) -> bool:
    """True for any error, and false for requests to end, such as KeyboardInterrupt."""
    return isinstance(error, Exception) or type(error).__name__ == _PANIC


def memory_cause(error: BaseException) -> BaseException | None:
    """The error of exhausted memory among `error` and its causes."""
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        if isinstance(here, StillhouseError):
            found = here.reason is Reason.OUT_OF_MEMORY
        else:
            told = isinstance(here, MemoryError) or getattr(here, "errno", None) == errno.ENOMEM
            found = told or any(phrase in str(here) for phrase in _NO_MEMORY)
        if found:
            return here
        here = here.__cause__ or here.__context__
    return None
