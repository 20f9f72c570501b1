"""The folder of `--batch-dir`: files and batches of all callers, each visible to its owner alone."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import BinaryIO

from stillhouse.client.core.errors import usage_error
from stillhouse.client.web.security.callers import Caller
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.files.disk_errors import is_full
from stillhouse.protos.files.locks import try_lock

LOCK_WAIT_S = 15.0
"""A server that has lost its parent ends the processes of its batches first."""
SERVER = "server"
"""Owner of what is made with the server's own credentials."""
_ID = re.compile(r"(file-|batch_)[0-9a-f]{24}")
_KEY_BYTES = 32


class BatchFolder:
    """The folder, locked as long as this object is open."""

    def __init__(self, path: Path) -> None:
        """Makes what is missing. Raises StillhouseError(INVALID_REQUEST) if it cannot be used, or another server keeps it.

        Blocks while one that ends has it.
        """
        self.path = path.resolve()
        self.files, self.batches, self.uploads = (
            self.path / name for name in ("files", "batches", "uploads")
        )
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = _locked(self.path / "lock")
            if lock is None:
                raise usage_error(
                    f"Another server uses --batch-dir {path}; stop it, or give this one its own."
                )
            self._lock = lock
            shutil.rmtree(self.uploads, ignore_errors=True)  # of requests that a killed server has left
            for folder in (self.files, self.batches, self.uploads):
                folder.mkdir(exist_ok=True, mode=0o700)
            key_path = self.path / "key"
            if not key_path.exists():
                write_atomic(key_path, secrets.token_bytes(_KEY_BYTES), private=True)
            self._key = key_path.read_bytes()
        except OSError as error:
            raise usage_error(
                f"--batch-dir {path} cannot be used ({error}). Give a folder that can be written."
            ) from error

    def owner_of(self, caller: Caller) -> str:
        """The owner that `caller` is: told by its token, of which nothing is kept; empty without one."""
        if caller.is_server:
            return SERVER
        if caller.token is None:
            return ""
        return hmac.digest(self._key, caller.token.encode(), hashlib.sha256).hex()

    def close(self) -> None:
        """Leaves the folder to another server."""
        self._lock.close()


def _locked(path: Path) -> BinaryIO | None:
    """The lock; None if another server keeps it for LOCK_WAIT_S."""
    ends_s = time.monotonic() + LOCK_WAIT_S
    while (lock := try_lock(path)) is None and time.monotonic() < ends_s:
        time.sleep(0.1)
    return lock


def new_id(prefix: str) -> str:
    """A new id with this prefix."""
    return f"{prefix}{secrets.token_hex(12)}"


def is_id(text: str, prefix: str) -> bool:
    """True if `text` may be the id of a file or batch, and with that a name in the folder."""
    return text.startswith(prefix) and _ID.fullmatch(text) is not None


def disk_error(error: OSError) -> StillhouseError:
    """The error of a request whose data cannot be written."""
    if is_full(error):
        return StillhouseError(
            Reason.DISK_FULL,
            f"The disk of --batch-dir on the web server's host is full ({os.strerror(error.errno or 0)}). Free space there, or "
            "delete files.",
        )
    return StillhouseError(
        Reason.INTERNAL, f"The folder of --batch-dir cannot be written ({error.strerror or error})."
    )
