"""Files of OpenAI's API on disk: uploaded ones, and the results of batches."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import structlog

from stillhouse.client.web.openai.batches.folder import BatchFolder, is_id, new_id
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import write_atomic

PREFIX = "file-"
MAX_FILES_OF_ONE = 10_000
MAX_NAME_CHARACTERS = 255
CONTENT = "content"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """One file."""

    id: str
    owner: str
    bytes: int
    created_at: int
    """Seconds since 1970."""
    filename: str
    purpose: str
    """"batch" of an input, "batch_output" of results."""

    def document(self) -> dict[str, Any]:
        """The file as the API has it."""
        shown = {name: value for name, value in asdict(self).items() if name != "owner"}
        return {**shown, "object": "file", "status": "processed", "expires_at": None}


class StoredFiles:
    """All files of a folder. Methods that write block; call them in a thread."""

    def __init__(self, folder: BatchFolder, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self._known: dict[str, StoredFile] = {}
        for path in folder.files.iterdir():
            found = _read(path)
            if found is None:
                shutil.rmtree(path, ignore_errors=True)  # a killed server has not finished it
            else:
                self._known[found.id] = found

    @property
    def room_bytes(self) -> int:
        """Bytes that may be added."""
        return self._max_bytes - sum(each.bytes for each in self._known.values())

    def of(self, owner: str, purpose: str | None = None) -> list[StoredFile]:
        """The owner's files, the newest first."""
        own = [
            each for each in self._known.values() if each.owner == owner and purpose in (None, each.purpose)
        ]
        return sorted(own, key=lambda each: (each.created_at, each.id), reverse=True)

    def get(self, owner: str, file_id: str) -> StoredFile:
        """The owner's file of this id. Raises StillhouseError(NOT_FOUND)."""
        found = self._known.get(file_id)
        if found is None or found.owner != owner:
            raise StillhouseError(
                Reason.NOT_FOUND, f"there is no file {file_id[:80]!r}; GET /v1/files lists them."
            )
        return found

    def path_of(self, file: StoredFile) -> Path:
        """The content of a file."""
        return self._folder.files / file.id / CONTENT

    def check_room(self, owner: str, size: int = 0) -> None:
        """Raises StillhouseError(QUOTA) if the owner may keep no more files, or there is no room for `size` bytes."""
        if size > self.room_bytes:
            raise StillhouseError(
                Reason.QUOTA,
                f"The files of --batch-dir have {self._max_bytes} bytes, which is the limit; delete some.",
            )
        if len(self.of(owner)) >= MAX_FILES_OF_ONE:
            raise StillhouseError(
                Reason.QUOTA, f"You keep {MAX_FILES_OF_ONE} files, which is the limit; delete some."
            )

    def add(self, owner: str, content: Path, *, filename: str, purpose: str) -> StoredFile:
        """Takes the file at `content`, which is moved. Raises OSError."""
        file = StoredFile(
            id=new_id(PREFIX),
            owner=owner,
            bytes=content.stat().st_size,
            created_at=int(time.time()),
            filename=filename[:MAX_NAME_CHARACTERS] or "upload.jsonl",
            purpose=purpose,
        )
        folder = self._folder.files / file.id
        folder.mkdir(mode=0o700)
        content.rename(folder / CONTENT)
        write_atomic(folder / "meta.json", json.dumps(asdict(file)).encode())
        self._known[file.id] = file
        return file

    def delete(self, file: StoredFile) -> None:
        """Removes a file."""
        self._known.pop(file.id, None)
        shutil.rmtree(self._folder.files / file.id, ignore_errors=True)

    def discard(self, owner: str, filename: str) -> None:
        """Removes results of this name."""
        for each in self.of(owner, "batch_output"):
            if each.filename == filename:
                self.delete(each)


def _read(path: Path) -> StoredFile | None:
    try:
        found = StoredFile(**json.loads((path / "meta.json").read_bytes()))
        whole = (path / CONTENT).stat().st_size == found.bytes
    except (OSError, ValueError, TypeError) as error:
        log.warning("file of a batch left out", path=str(path), why=str(error))
        return None
    return found if whole and found.id == path.name and is_id(found.id, PREFIX) else None
