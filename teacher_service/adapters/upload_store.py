"""Store of uploaded adapters, by fingerprint: an upload is kept complete and checked or not at all, in bounded disk
space."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.adapter import FILES
from stillhouse.protos.files.atomic import sync_directory, sync_file
from stillhouse.protos.files.disk_errors import is_full
from stillhouse.protos.stillhouse.v1.teacher_pb2 import UploadAdapterRequest
from stillhouse.teacher_service.models.adapter_files import check_ranks
from stillhouse.teacher_service.models.fingerprint import adapter_fingerprint

KEPT_UPLOADS = 4
"""Limit of the store as a multiple of the largest upload; the oldest unloaded adapters make room."""
_PARTIAL = ".upload-"
_PARTIAL_MAX_AGE_S = 24 * 3600.0


class UploadStore:
    """Directory of uploaded adapters by fingerprint; several teachers may share it."""

    def __init__(self, directory: Path, *, max_bytes: int) -> None:
        """`max_bytes` bounds one upload; 0 refuses uploads."""
        self.directory = directory
        self._max_bytes = max_bytes
        self._room = asyncio.Semaphore(KEPT_UPLOADS)

    async def receive(
        self, chunks: AsyncIterator[UploadAdapterRequest], *, in_use: Collection[Path]
    ) -> tuple[Path, str]:
        """Stores an uploaded adapter; returns its directory and fingerprint. The same content is stored once.

        Raises `StillhouseError` and keeps nothing: INVALID_REQUEST, ADAPTER_INVALID, QUOTA, DISK_FULL.
        """
        if self._max_bytes == 0:
            raise StillhouseError(
                Reason.CAPABILITY,
                "This teacher takes no uploads. Put the adapter's directory where the teacher's host can read it and call "
                "LoadAdapter with its path, or start the teacher with a larger --max-upload-bytes.",
                metadata={"capability": "UploadAdapter"},
            )
        partial = self.directory / f"{_PARTIAL}{secrets.token_hex(8)}"
        async with self._room:
            try:
                await asyncio.to_thread(partial.mkdir, parents=True)
                await _UploadWriter(partial, self._max_bytes).write(chunks)
                return await asyncio.to_thread(self._keep, partial, in_use)
            except OSError as error:
                raise self._not_written(error) from error
            finally:
                await asyncio.shield(asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True))

    def _not_written(self, error: OSError) -> StillhouseError:
        if is_full(error):
            return StillhouseError(
                Reason.DISK_FULL,
                f"The disk of this teacher's uploads ({self.directory}) is full. Free some space, or start the teacher "
                "with another --upload-dir.",
            )
        return StillhouseError(
            Reason.INVALID_CONFIG,
            f"This teacher cannot write to {self.directory} ({error.strerror}). Start it with another --upload-dir.",
        )

    def _keep(self, partial: Path, in_use: Collection[Path]) -> tuple[Path, str]:
        check_ranks("upload", partial)
        fingerprint = adapter_fingerprint(partial)
        final = self.directory / fingerprint
        if not final.is_dir():
            self._make_room(_size(partial), in_use)
            sync_directory(partial)
            move_once(partial, final)
            sync_directory(self.directory)
        os.utime(final)
        return final, fingerprint

    def _make_room(self, num_bytes: int, in_use: Collection[Path]) -> None:
        """Removes the oldest adapters that are not loaded, and partial uploads of killed teachers."""
        for path in self.directory.glob(f"{_PARTIAL}*"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _PARTIAL_MAX_AGE_S:
                    shutil.rmtree(path, ignore_errors=True)
        kept = [path for path in self.directory.iterdir() if not path.name.startswith(".")]
        sizes = {path: _size(path) for path in kept}
        excess = sum(sizes.values()) + num_bytes - KEPT_UPLOADS * self._max_bytes
        for path in sorted(kept, key=_time):
            if excess <= 0:
                return
            if path not in in_use:
                shutil.rmtree(path, ignore_errors=True)
                excess -= sizes[path]
        if excess > 0:
            raise StillhouseError(
                Reason.QUOTA,
                f"The adapters that are loaded leave no room for another in {self.directory}, which holds "
                f"{KEPT_UPLOADS * self._max_bytes} bytes. Unload one, or start the teacher with a larger --max-upload-bytes.",
            )


class _UploadWriter:
    """Writes the two files of an upload, one after the other."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._written: list[str] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._expected = ""

    async def write(self, chunks: AsyncIterator[UploadAdapterRequest]) -> None:
        try:
            async for chunk in chunks:
                if chunk.file_name and chunk.file_name not in self._written[-1:]:
                    await asyncio.to_thread(self._begin, chunk.file_name, chunk.sha256.lower())
                if self._file is None:
                    raise _invalid(f"its first chunk must name one of {' and '.join(FILES)}")
                self._num_bytes += len(chunk.data)
                if self._num_bytes > self._max_bytes:
                    raise StillhouseError(
                        Reason.QUOTA,
                        f"The adapter has more than the {self._max_bytes} bytes that this teacher takes. Use a lower rank or "
                        "fewer modules, or start the teacher with a larger --max-upload-bytes.",
                    )
                await asyncio.to_thread(self._append, chunk.data)
            await asyncio.to_thread(self._end)
        finally:
            if self._file is not None:
                self._file.close()
        missing = [name for name in FILES if name not in self._written]
        if missing:
            raise _invalid(f"{' and '.join(missing)} is missing")

    def _begin(self, name: str, expected: str) -> None:
        self._end()
        if name not in FILES or name in self._written:
            raise _invalid(f"{name[:80]!r} is not taken: an adapter is {' and '.join(FILES)}, each once")
        self._file = (self._directory / name).open("xb")
        self._written.append(name)
        self._digest, self._expected = hashlib.sha256(), expected

    def _append(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._digest.update(data)

    def _end(self) -> None:
        if self._file is None:
            return
        sync_file(self._file)
        self._file.close()
        self._file = None
        found = self._digest.hexdigest()
        if self._expected and found != self._expected:
            raise _invalid(
                f"{self._written[-1]} has the SHA-256 {found[:12]} and not {self._expected[:12]}: it was damaged on its way, "
                "or changed while it was read. Upload it again"
            )


def move_once(partial: Path, final: Path) -> None:
    """Renames a directory, unless a concurrent upload of the same content was faster and `final` has files."""
    try:
        partial.rename(final)
    except OSError as error:
        if error.errno not in {errno.EEXIST, errno.ENOTEMPTY}:
            raise


def _size(directory: Path) -> int:
    with suppress(FileNotFoundError):
        return sum(path.stat().st_size for path in directory.iterdir())
    return 0


def _time(path: Path) -> float:
    with suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0.0


def _invalid(why: str) -> StillhouseError:
    return StillhouseError(Reason.ADAPTER_INVALID, f"The uploaded adapter is refused: {why}.")
