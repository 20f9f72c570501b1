"""Reads files below a run directory that a client names: no symbolic link is followed, nothing outside is reached."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path, PurePosixPath

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import Artifact
from stillhouse.student_trainer.run_dir import MANIFEST

PIECE_BYTES = 512 * 1024
"""Bytes of a file in one message."""
ARTIFACT_FOLDERS = (
    "checkpoints",
    "final",
    "exports",
    "evaluations",
    "eval_targets",
    "tensorboard",
    "trackers",
)
ARTIFACT_FILES = ("spec.json", "effective_spec.json", "teacher.json")
HASHES_KEPT = 10_000

Identity = tuple[str, int, int, int]
"""Path, inode, size and modification time of a hashed file."""


class Artifacts:
    """Lists artifacts of runs and caches their hashes."""

    def __init__(self) -> None:
        self._hashes: dict[Identity, str] = {}

    def listing(self, run_path: Path) -> list[Artifact]:
        """Every artifact of a run by path; only complete checkpoints. Blocks: it reads every new file."""
        found = []
        for path in _paths(run_path):
            try:
                with open_below(run_path, path) as file:
                    size = os.fstat(file.fileno()).st_size
                    found.append(
                        Artifact(path=path, size_bytes=size, sha256=self._sha256(run_path / path, file))
                    )
            except StillhouseError:
                continue  # removed meanwhile, or not a regular file
        return found

    def _sha256(self, path: Path, file: BufferedReader) -> str:
        status = os.fstat(file.fileno())
        identity = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
        if identity not in self._hashes:
            while len(self._hashes) >= HASHES_KEPT:
                del self._hashes[next(iter(self._hashes))]
            self._hashes[identity] = hashlib.file_digest(file, "sha256").hexdigest()
        return self._hashes[identity]


def _paths(run_path: Path) -> Iterator[str]:
    """Sorted paths below the run, without partial files."""
    for name in sorted((*ARTIFACT_FILES, *ARTIFACT_FOLDERS)):
        if name in ARTIFACT_FILES:
            if (run_path / name).is_file():
                yield name
            continue
        for folder, folders, files in os.walk(run_path / name):
            folders[:] = sorted(each for each in folders if not each.startswith("."))
            if Path(folder) == run_path / "checkpoints":
                folders[:] = [each for each in folders if (Path(folder) / each / MANIFEST).is_file()]
            for file in sorted(files):
                if not file.startswith("."):
                    yield (Path(folder) / file).relative_to(run_path).as_posix()


def open_below(root: Path, path: str) -> BufferedReader:
    """The regular file `path`, relative to `root`, open for reading.

    Each part is opened without following links, so that a link created meanwhile has no effect.

    Raises:
        StillhouseError: INVALID_REQUEST for a path that is not plain and relative, ARTIFACT_NOT_FOUND.
    """
    parts = PurePosixPath(path).parts
    if not parts or "\0" in path or path.startswith("/") or ".." in parts:
        raise StillhouseError(
            Reason.INVALID_REQUEST,
            f"{path!r} is not a path below the run; give one that ListArtifacts shows.",
        )
    missing = StillhouseError(
        Reason.ARTIFACT_NOT_FOUND,
        f"The run has no file {path!r}; ListArtifacts shows what it has.",
        resource=path,
    )
    try:
        here = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        for part in parts:
            last = part is parts[-1]
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | (0 if last else os.O_DIRECTORY)
            try:
                following = os.open(part, flags, dir_fd=here)
            finally:
                os.close(here)
            here = following
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO):
            raise missing from error
        raise
    if not stat.S_ISREG(os.fstat(here).st_mode):
        os.close(here)
        raise missing
    return os.fdopen(here, "rb")


def is_artifact(path: str) -> bool:
    """True if ListArtifacts may show `path`."""
    parts = PurePosixPath(path).parts
    return path in ARTIFACT_FILES or (bool(parts) and parts[0] in ARTIFACT_FOLDERS)
