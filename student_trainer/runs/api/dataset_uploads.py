"""Receives uploaded datasets: stored by content, atomically, within the size limit."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import sync_directory, sync_file
from stillhouse.protos.files.disk_errors import is_full
from stillhouse.protos.rows.reading.open_file import COMPRESSED, container_of, plain_suffix
from stillhouse.protos.stillhouse.v1.run_pb2 import UploadDatasetRequest
from stillhouse.student_trainer.runs.store.datasets import Upload

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""Formats that the training process reads; the file keeps its suffix, and that of its compression."""
MAX_FILE_NAME_CHARACTERS = 255
_TEMPORARY = ".upload-"
_CHANGING = ".changing-"
"""Before the digest of a file that comes or goes: it may lack its row in the store."""


Check = Callable[[UploadDatasetRequest], Awaitable[None]]
"""Called with the first chunk; raises for one that is refused."""


@asynccontextmanager
async def received(
    folder: Path, chunks: AsyncIterator[UploadDatasetRequest], *, check: Check, max_bytes: int
) -> AsyncIterator[tuple[Upload, Path]]:
    """Receives the concatenated `chunks` in a file of the same suffix, which is removed unless it gets another name.

    Raises:
        StillhouseError: INVALID_REQUEST, DATASET_INVALID, QUOTA above `max_bytes`, DISK_FULL; then nothing is stored.
    """
    temporary = folder / f"{_TEMPORARY}{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as file:
            upload = await _write(file, chunks, check, max_bytes)
            await asyncio.to_thread(sync_file, file)
        temporary = temporary.rename(temporary.with_name(temporary.name + upload.suffix))
        yield upload, temporary
    except OSError as error:
        if not is_full(error):
            raise
        raise StillhouseError(
            Reason.DISK_FULL,
            "The disk of the service's data directory is full; free some space and upload again.",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


async def _write(
    file: BinaryIO, chunks: AsyncIterator[UploadDatasetRequest], check: Check, max_bytes: int
) -> Upload:
    """Writes the chunks; returns what is known of the file."""
    first, name, digest, size = UploadDatasetRequest(), "", hashlib.sha256(), 0
    async for chunk in chunks:
        if not name:
            first, name = chunk, _checked(chunk.file_name)
            await check(first)
        elif chunk.file_name not in ("", name):
            raise StillhouseError(
                Reason.INVALID_REQUEST,
                f"A chunk of {name!r} names the file {chunk.file_name!r}; send one file per call.",
            )
        size += len(chunk.data)
        if size > max_bytes:
            raise StillhouseError(
                Reason.QUOTA,
                f"{name!r} has more than the {max_bytes} bytes that this service takes; split it, or start the service "
                "with a larger --max-upload-bytes.",
            )
        digest.update(chunk.data)
        await asyncio.to_thread(file.write, chunk.data)
    if size == 0:
        raise StillhouseError(Reason.DATASET_INVALID, f"The uploaded file {name!r} is empty; send its rows.")
    return Upload(
        sha256=digest.hexdigest(),
        suffix=_suffix(name),
        file_name=name,
        size_bytes=size,
        dataset_id=first.dataset_id,
        num_rows=first.num_rows,
        num_tokens=first.num_tokens,
    )


def _checked(name: str) -> str:
    """Returns `name` if it is a valid dataset file name."""
    plain = name.isprintable() and "/" not in name and len(name) <= MAX_FILE_NAME_CHARACTERS
    if not name or not plain:
        raise StillhouseError(
            Reason.INVALID_REQUEST,
            f"{name[:80]!r} is not a file name; the first chunk needs one such as 'train.jsonl'.",
        )
    if plain_suffix(Path(name)) not in SUFFIXES:
        raise StillhouseError(
            Reason.DATASET_INVALID,
            f"{name!r} does not end in one of {', '.join(SUFFIXES)}, by which its format is known; rename or convert it.",
        )
    return name


def _suffix(name: str) -> str:
    packed = Path(name).suffix if Path(name).suffix in COMPRESSED else ""
    return plain_suffix(Path(name)) + packed


def keep(folder: Path, received_file: Path, upload: Upload, suffix: str | None) -> Upload:
    """Gives a received file its name, `folder`/<sha256><suffix>; `suffix` is that of equal content which is stored already.

    Raises StillhouseError(DATASET_INVALID) if the content would be read as another format under that suffix.
    """
    stored = folder / f"{upload.sha256}{upload.suffix if suffix is None else suffix}"
    if suffix not in (None, upload.suffix):
        here, there = container_of(received_file), container_of(stored) if stored.is_file() else None
        if here != there:
            raise StillhouseError(
                Reason.DATASET_INVALID,
                f"{upload.file_name!r} has the bytes of a dataset that is stored as {suffix} and read as {there}, where this "
                f"name means {here}. Give it the suffix {suffix}, or other content.",
            )
    received_file.rename(stored)
    sync_directory(folder)
    return upload if suffix is None else replace(upload, suffix=suffix)


def begin_change(folder: Path, digest: str) -> None:
    """Notes that a file and its row come or go, which a kill may come between."""
    (folder / f"{_CHANGING}{digest}").touch()
    sync_directory(folder)


def end_change(folder: Path, digest: str, *, has_row: Callable[[str], bool]) -> None:
    """Deletes a file that has no row in the store, with any suffix, and the note of `begin_change`."""
    if not has_row(digest):
        for path in folder.glob(f"{digest}.*"):
            path.unlink(missing_ok=True)
    (folder / f"{_CHANGING}{digest}").unlink(missing_ok=True)


def remove_leftovers(folder: Path, *, has_row: Callable[[str], bool]) -> None:
    """Deletes what a killed service has left: partial uploads, and files without their rows."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        path.unlink(missing_ok=True)
    for path in folder.glob(f"{_CHANGING}*"):
        end_change(folder, path.name.removeprefix(_CHANGING), has_row=has_row)
