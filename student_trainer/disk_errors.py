"""A full or broken disk: how it is told from other errors, whichever library met it, and how people are told where it is."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What writing fails with where no more may be written."""
BROKEN = frozenset({errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV})
"""What reading or writing fails with where the disk itself does."""
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust, such as safetensors, name the number."""


def is_full(error: BaseException) -> bool:
    """Whether a full disk is behind an error."""
    return not FULL.isdisjoint(_numbers(error))


def is_too_long(error: BaseException) -> bool:
    """Whether a limit of a file's length is behind an error, and not the disk's room."""
    return errno.EFBIG in _numbers(error)


def is_broken(error: BaseException) -> bool:
    """Whether a disk that fails, or was taken away, is behind an error."""
    return not BROKEN.isdisjoint(_numbers(error))


def _numbers(error: BaseException) -> Iterator[int]:
    """The system's numbers in an error and its causes: torch and safetensors raise errors of their own on top of them."""
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        if isinstance(here, OSError) and here.errno is not None:
            yield here.errno
        number = _OS_ERROR.search(str(here))
        if number is not None:
            yield int(number[1])
        here = here.__cause__ or here.__context__


def describe(path: Path) -> str:
    """The disk that holds `path`, with its free bytes, for a sentence: "the disk mounted at /data (0 of 64 bytes free)"."""
    here = path.resolve()
    while not here.exists():
        here = here.parent
    mount = next((each for each in (here, *here.parents) if each.is_mount()), Path("/"))
    usage = shutil.disk_usage(here)
    return f"the disk mounted at {mount} ({usage.free} of {usage.total} bytes free)"


def full_sentence(run_path: Path) -> str:
    """What a full disk means for the run in `run_path`, and what to do; caches may lie on a disk of their own."""
    caches = run_path.resolve().parent.parent / "caches"
    places = [run_path, *(sorted(caches.iterdir()) if caches.is_dir() else ())]
    fullest = min(places, key=lambda path: shutil.disk_usage(path).free)
    return (
        f"There is no room for the run's files in {fullest}, on {describe(fullest)}. Its last complete checkpoint is intact. "
        "Free some space there, or lower checkpoint.keep, then resume the run."
    )


def too_long_sentence(run_path: Path) -> str:
    """What a limit of a file's length means for the run in `run_path`, and what to do."""
    return (
        f"A file of the run in {run_path} would be longer than its process or its file system allows. Its last complete "
        "checkpoint is intact. Raise the limit (`ulimit -f` of the run service), then resume the run."
    )


def broken_sentence(run_path: Path, error: BaseException) -> str:
    """What a disk that fails means for the run in `run_path`, and what to do."""
    return (
        f"A file of the run in {run_path} could not be read or written ({error}): {describe(run_path)} fails. Mend or "
        "replace it, then resume the run: it goes on from its newest checkpoint that is found to be whole."
    )
