"""File locks between processes (flock): the operating system releases them when their holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def try_lock(path: Path) -> BinaryIO | None:
    """Locks the file at `path`, made if it is missing; None if another holder has it. Closing the file unlocks it."""
    return _held(path.open("ab"), fcntl.LOCK_EX)


def try_share(path: Path) -> BinaryIO | None:
    """Shares the lock of an existing file; None if there is no file, or another holder has the lock of `try_lock`."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    return _held(file, fcntl.LOCK_SH)


def _held(file: BinaryIO, kind: int) -> BinaryIO | None:
    """Returns `file` with its lock; None, and the file closed, if another holder excludes that."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    return file


def is_locked(path: Path) -> bool:
    """True if a holder has the lock of `try_lock`."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextmanager
def directory_lock(path: Path) -> Iterator[None]:
    """Waits for the lock of directory `path` and holds it until the block ends."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
