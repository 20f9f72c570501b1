"""Error sentences for a run that cannot write its files: the disk, its free bytes, and the remedy."""

from __future__ import annotations

import shutil
from pathlib import Path

from stillhouse.protos.files.disk_errors import describe


def full_sentence(run_path: Path) -> str:
    """Explains a full disk for the run in `run_path`; its caches may lie on another disk."""
    caches = run_path.resolve().parent.parent / "caches"
    folders = [run_path, *(sorted(caches.iterdir()) if caches.is_dir() else ())]
    fullest = min(folders, key=lambda path: shutil.disk_usage(path).free)
    return (
        f"There is no room for the run's files in {fullest}, on {describe(fullest)}. Its last complete checkpoint is intact. "
        "Free some space there, or lower checkpoint.keep, then resume the run."
    )


def too_long_sentence(run_path: Path) -> str:
    """Explains a limit on file size for the run in `run_path`."""
    return (
        f"A file of the run in {run_path} would exceed the size limit of its process or file system. Its last complete "
        "checkpoint is intact. Raise the limit (`ulimit -f` of the run service), then resume the run."
    )


def broken_sentence(run_path: Path, error: BaseException) -> str:
    """Explains a failing disk for the run in `run_path`."""
    return (
        f"A file of the run in {run_path} could not be read or written ({error}): {describe(run_path)} fails. Repair or "
        "replace the disk, then resume the run: it continues from its newest intact checkpoint."
    )
