"""The service's data directory: its folders, its layout's version, and the lock that keeps a second service out."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.files.disk_errors import describe, is_full
from stillhouse.protos.files.locks import try_lock
from stillhouse.student_trainer.prepared_store import FOLDER as PREPARED
from stillhouse.student_trainer.prepared_store import PreparedStore

LAYOUT = 1
"""Version of the folders and files; an older one is migrated at the start, a later one refused."""
CREDENTIALS = "credentials.toml"
FOLDERS = ("datasets", "caches", "adapters", "runs", PREPARED)


@dataclass(frozen=True, slots=True)
class DataDir:
    """An open data directory; the lock is held as long as this object is."""

    path: Path
    lock: BinaryIO

    @classmethod
    def open(cls, path: Path) -> DataDir:
        """Opens the data directory at `path`, created if missing.

        Raises:
            StillhouseError: INVALID_CONFIG if another service uses it, a later version wrote it, or it cannot be written.
        """
        try:
            path = path.resolve()
            for folder in ("", *FOLDERS):
                (path / folder).mkdir(parents=True, exist_ok=True)
            lock = try_lock(path / "lock")
        except OSError as error:
            raise _unusable(path, error) from error
        if lock is None:
            raise StillhouseError(
                Reason.INVALID_CONFIG,
                f"Another run service uses --data-dir {path}; stop it, or give this one its own folder.",
            )
        try:
            _check_version(path)
            _check_credentials(path / CREDENTIALS)
        except OSError as error:
            lock.close()
            raise _unusable(path, error) from error
        except StillhouseError:
            lock.close()
            raise
        return cls(path, lock)

    @property
    def credentials_path(self) -> Path:
        """Secrets of teachers, read by training processes."""
        return self.path / CREDENTIALS

    @property
    def tokens_path(self) -> Path:
        """Tokens file; calls need a token once it exists."""
        return self.path / "tokens.json"

    @property
    def audit_path(self) -> Path:
        """Audit log."""
        return self.path / "audit.jsonl"

    @property
    def database_path(self) -> Path:
        """SQLite database of the store."""
        return self.path / "stillhouse.db"

    @property
    def datasets_path(self) -> Path:
        """Uploaded files."""
        return self.path / "datasets"

    @property
    def prepared(self) -> PreparedStore:
        """Datasets that runs have encoded."""
        return PreparedStore(self.path / PREPARED)

    @property
    def runs_path(self) -> Path:
        """Run directories."""
        return self.path / "runs"

    def close(self) -> None:
        """Releases the directory."""
        self.lock.close()


def _unusable(path: Path, error: OSError) -> StillhouseError:
    if is_full(error):
        why = f"{describe(path)} is full. Free some space there, or give another folder."
    else:
        why = f"{error}. Give a folder that can be written."
    return StillhouseError(Reason.INVALID_CONFIG, f"--data-dir {path} cannot be used: {why}")


def _check_credentials(path: Path) -> None:
    """Refuses secrets that others on this host can read."""
    if path.exists() and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"Others on this host can read {path}; run `chmod 600 {path}` and start again.",
        )


def _check_version(path: Path) -> None:
    """Writes the layout version to a new directory; refuses an unknown one."""
    version_path = path / "VERSION"
    if not version_path.exists():
        write_atomic(version_path, f"{LAYOUT}\n".encode())
        return
    text = version_path.read_text(errors="replace").strip()
    if text != str(LAYOUT):
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"--data-dir {path} has layout {text[:20]!r}, and this version of Stillhouse supports {LAYOUT}. Start the "
            "version that wrote it, or give another folder.",
        )
