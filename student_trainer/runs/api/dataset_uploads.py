"""Receives uploaded datasets: stored by content, atomically, within the size limit."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import sync_directory, sync_file
from stillhouse.protos.files.disk_errors import is_full
from stillhouse.protos.rows.reading.open_file import COMPRESSED, plain_suffix
from stillhouse.protos.stillhouse.v1.run_pb2 import UploadDatasetRequest
from stillhouse.student_trainer.runs.store.datasets import Upload

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""Formats that the training process reads; the file keeps its suffix, and that of its compression."""
MAX_FILE_NAME_CHARACTERS = 255
_TEMPORARY = ".upload-"


Check = Callable[[UploadDatasetRequest], Awaitable[None]]
"""Called with the first chunk; raises for one that is refused."""
Keep = Callable[[], Awaitable[None]]
"""Gives the received file its name in the folder."""


@asynccontextmanager
async def received(
    folder: Path, chunks: AsyncIterator[UploadDatasetRequest], *, check: Check, max_bytes: int
) -> AsyncIterator[tuple[Upload, Keep]]:
    """Receives the concatenated `chunks`; the second value stores them as `folder`/<sha256><suffix>, else nothing stays.

    Raises:
        StillhouseError: INVALID_REQUEST, DATASET_INVALID, QUOTA above `max_bytes`, DISK_FULL; then nothing is stored.
    """
    temporary = folder / f"{_TEMPORARY}{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as file:
            upload = await _write(file, chunks, check, max_bytes)
            await asyncio.to_thread(sync_file, file)

        async def keep() -> None:
            temporary.rename(folder / f"{upload.sha256}{upload.suffix}")
            await asyncio.to_thread(sync_directory, folder)

        yield upload, keep
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


def remove(folder: Path, digest: str) -> None:
    """Deletes a file by its content, with any suffix."""
    for path in folder.glob(f"{digest}.*"):
        path.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Deletes partial uploads of a killed service."""
    for path in folder.glob(f"{_TEMPORARY}*"):
        path.unlink(missing_ok=True)
