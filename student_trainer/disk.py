"""A full disk: how it is told from other errors, whichever library met it, and how people are told where it is."""

from __future__ import annotations

import errno
import re
import shutil
from pathlib import Path

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What writing fails with where no more may be written."""
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How libraries in Rust, such as safetensors, name the number."""


def is_full(error: BaseException) -> bool:
    """Whether a full disk is behind an error: torch and safetensors raise errors of their own while they handle it."""
    seen: set[int] = set()
    here: BaseException | None = error
    while here is not None and id(here) not in seen:
        seen.add(id(here))
        if isinstance(here, OSError) and here.errno in FULL:
            return True
        number = _OS_ERROR.search(str(here))
        if number is not None and int(number[1]) in FULL:
            return True
        here = here.__cause__ or here.__context__
    return False


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
