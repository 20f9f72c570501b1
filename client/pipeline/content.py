"""Digests of files and folders, by which a pipeline knows that what a stage reads or has made is unchanged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from stillhouse.client.core.errors import file_errors, usage_error

CHUNK_BYTES = 1 << 20


def content_hash(path: Path) -> str:
    """SHA-256 of a file, or of the names and files of a folder; links are followed.

    Raises StillhouseError for what cannot be read, is neither file nor folder, or is a link to a folder around it.
    """
    digest = hashlib.sha256()
    with file_errors("read", path):
        if path.is_dir():
            for file in _files(path, frozenset()):
                digest.update(os.fsencode(f"{file.relative_to(path)} {content_hash(file)}"))
            return digest.hexdigest()
        if path.exists() and not path.is_file():
            raise usage_error(
                f"{path} is neither a file nor a folder, so its content cannot be compared; name a file."
            )
        with path.open("rb") as opened:
            while chunk := opened.read(CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path, around: frozenset[Path]) -> Iterator[Path]:
    """Yields the files of a folder, then those of its folders, by name; `around` are the folders that it lies in."""
    real = folder.resolve()
    if real in around:
        raise usage_error(f"{folder} is a link to a folder that it lies in; remove the link.")
    folders = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            folders.append(path)
        else:
            yield path
    for path in folders:
        yield from _files(path, around | {real})
