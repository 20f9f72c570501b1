"""Errors of a full or broken disk, told from others whichever library raised them."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error numbers of a write for which the disk, a quota or a limit on file size leaves no room."""
BROKEN = frozenset({errno.EIO, errno.EROFS, errno.ESTALE, errno.ENODEV})
"""Error numbers of a disk that itself fails."""
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""The number in error texts of Rust libraries such as safetensors."""


def is_full(error: BaseException) -> bool:
    """True if a full disk caused the error."""
    return not FULL.isdisjoint(_numbers(error))


def is_too_long(error: BaseException) -> bool:
    """True if a limit on file size caused the error, and not a full disk."""
    return errno.EFBIG in _numbers(error)


def is_broken(error: BaseException) -> bool:
    """True if a disk that fails, or was unmounted, caused the error."""
    return not BROKEN.isdisjoint(_numbers(error))


def _numbers(error: BaseException) -> Iterator[int]:
    """System error numbers in an error and its causes, since torch and safetensors wrap OSError in their own types."""
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
    """The disk that holds `path`, as in "the disk mounted at /data (0 of 64 bytes free)"."""
    here = path.resolve()
    while not here.exists():
        here = here.parent
    mount = next((each for each in (here, *here.parents) if each.is_mount()), Path("/"))
    usage = shutil.disk_usage(here)
    return f"the disk mounted at {mount} ({usage.free} of {usage.total} bytes free)"
