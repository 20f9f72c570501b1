"""Prepared datasets on disk: folders named by a digest of all that decides their content, shared by runs and kept within bounds.

A folder appears under its name whole, or not at all. Who reads or writes one shares its lock; what nobody holds may be
removed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from stillhouse.protos.files.atomic import sync_directory, sync_tree
from stillhouse.protos.files.locks import try_lock, try_share

FOLDER = "prepared"
"""Name of the store in a data directory, or in the directory of a run that no service started."""
MANIFEST = "prepared.json"
CONTENTS = ".contents"
"""Folder of what the files of datasets held when they were read last."""
OWN = "own-"
"""Begins the name of a folder that no other run finds."""
_LOCK = "lock"
_TEMPORARY = ".new-"
_REMOVED = ".old-"
_LOCK_S = 60.0
"""Age from which a folder without a lock file is a leftover, and not one that is being made."""
_TURN = ".turn-"
"""Begins the name of the lock file of those who would prepare the same data."""


class PreparedFolder:
    """A complete folder that nobody removes until this object is closed or gone."""

    def __init__(self, path: Path, manifest: dict[str, Any], lock: BinaryIO) -> None:
        self.path = path
        self.manifest = manifest
        self.close = weakref.finalize(self, lock.close)
        """Allows its removal."""


class PreparedStore:
    """The prepared datasets in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open(self, name: str) -> PreparedFolder | None:
        """Opens a folder and marks it used; None if it is missing, damaged, or being removed."""
        path = self.folder / name
        lock = try_share(path / _LOCK)
        if lock is None:
            return None
        try:
            # It may have been removed between the opening and the locking of the file.
            if not os.path.samestat(os.fstat(lock.fileno()), (path / _LOCK).stat()):
                raise FileNotFoundError(path)
            manifest = json.loads((path / MANIFEST).read_bytes())
            whole = all((path / file).stat().st_size == size for file, size in manifest["files"].items())
            if not whole:
                raise ValueError(path)  # noqa: TRY301
            os.utime(path / _LOCK)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            lock.close()
            return None
        return PreparedFolder(path, manifest, lock)

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[bool]:
        """Yields True to one at a time of those who would write the folder `name`, which saves the others the work."""
        self.folder.mkdir(exist_ok=True)
        lock = try_lock(self.folder / f"{_TURN}{name}")
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.close()

    @contextlib.contextmanager
    def new_folder(self) -> Iterator[Path]:
        """An empty folder for `put`; what is left of it when the block ends is removed."""
        path = self.folder / f"{_TEMPORARY}{secrets.token_hex(8)}"
        path.mkdir(parents=True)
        # Locked before it has its name: a sweep spares a new folder that has no lock file.
        unnamed = path / f".{_LOCK}"
        unnamed.touch()
        lock = try_share(unnamed)
        unnamed.rename(path / _LOCK)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            if lock is not None:
                lock.close()

    def put(self, path: Path, name: str, manifest: dict[str, Any]) -> None:
        """Gives the folder of `new_folder` its name, with the files and the manifest that it will have; on disk when this returns."""
        files = {
            file.name: file.stat().st_size for file in path.iterdir() if file.name not in (_LOCK, MANIFEST)
        }
        (path / MANIFEST).write_text(json.dumps({**manifest, "files": files}))
        sync_tree(path)
        held = self.open(name)
        if held is None:
            self.discard(name)
        else:
            held.close()
        try:
            path.rename(self.folder / name)
        except OSError as error:
            # Another process was faster, or holds what is damaged: who opens the name sees which.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        sync_directory(self.folder)

    def discard(self, name: str) -> None:
        """Removes a folder, unless a process holds it."""
        if (self.folder / name).exists():
            _remove(self.folder / name)

    def clean(self, *, max_bytes: int, keep_days: float, now: float | None = None) -> int:
        """Removes what no process will open any more, what was not used for `keep_days`, and of the rest the longest unused
        above `max_bytes`; never what a process holds. Returns the bytes that were freed.
        """
        if not self.folder.is_dir():
            return 0
        for beginning in (_TEMPORARY, _REMOVED, OWN):
            for leftover in list(self.folder.glob(f"{beginning}*")):
                _remove(leftover)
        limit = (time.time() if now is None else now) - keep_days * 86_400
        found = [path for path in self.folder.iterdir() if not path.name.startswith(".")]
        used = sorted(((_last_use(path), _size(path), path) for path in found), reverse=True)
        kept = freed = 0
        for time_s, size, path in used:
            if (time_s < limit or kept + size > max_bytes) and _remove(path):
                freed += size
            else:
                kept += size
        for memory in (self.folder / CONTENTS).glob("*"):
            if _last_use(memory, "") < limit:
                memory.unlink(missing_ok=True)
        for file in self.folder.glob(f"{_TURN}*"):
            if _last_use(file, "") < limit and (lock := try_lock(file)) is not None:
                file.unlink(missing_ok=True)
                lock.close()
        return freed


def _remove(path: Path) -> bool:
    """Removes a folder unless a process holds it; True if it is gone."""
    lock = None
    if (path / _LOCK).is_file():
        lock = try_lock(path / _LOCK)
        if lock is None:
            return False
    elif time.time() - _last_use(path, "") < _LOCK_S:
        return False
    try:
        gone = path
        if not path.name.startswith(_REMOVED):
            gone = path.with_name(f"{_REMOVED}{secrets.token_hex(8)}")
            with contextlib.suppress(FileNotFoundError):
                path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
    finally:
        if lock is not None:
            lock.close()
    return True


def _last_use(path: Path, name: str = _LOCK) -> float:
    try:
        return (path / name).stat().st_mtime
    except OSError:
        return 0.0


def _size(path: Path) -> int:
    total = 0
    for file in path.iterdir() if path.is_dir() else ():
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total
