"""Atomic files: written under a temporary name, synced, then renamed; a reader sees the old file or the new one."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from stillhouse.protos.files.disk_errors import FULL


@contextmanager
def atomic_writer(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """An open file that replaces `path` when the block ends; a block that raises leaves `path` as it was.

    The new file is on disk when this returns, also after a power cut. `private`: only its owner may read it. Raises
    OSError for a device or a pipe, and with the name of `path` for a full disk.
    """
    refuse_special(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            sync_file(file)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None and error.errno in FULL:
            error.filename = str(path)
        raise
    sync_directory(path.parent)


def refuse_special(path: Path) -> None:
    """Raises OSError for a path such as /dev/stdout, which is no file and which a file would replace for everybody."""
    what = ""
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            what = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        elif path.is_symlink() and path.readlink().parts[:2] == ("/", "proc"):
            what = "a link to an open file"
    if what:
        raise OSError(errno.EEXIST, f"it is {what}, which a file would replace; name a file", str(path))


def write_atomic(path: Path, data: bytes, *, private: bool = False) -> None:
    """Replaces `path` by `data`, as `atomic_writer` does."""
    with atomic_writer(path, private=private) as file:
        file.write(data)


def sync_file(file: IO[Any]) -> None:
    """Flushes an open file to disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Makes the names in directory `path` survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Flushes every file and folder below `directory` to disk."""
    for folder, _, names in os.walk(directory):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(folder))
