"""Uploads a LoRA adapter as chunks of its two files; no other file of its directory is read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path

from stillhouse.client.core.errors import file_error
from stillhouse.protos.files.adapter import FILES
from stillhouse.protos.stillhouse.v1.teacher_pb2 import UploadAdapterRequest

CHUNK_BYTES = 512 * 1024


@contextmanager
def adapter_chunks(
    directory: Path, on_bytes: Callable[[int], None] | None
) -> Iterator[Iterator[UploadAdapterRequest]]:
    """Yields the requests that carry the adapter in `directory`. Raises StillhouseError if one of its files is missing."""
    with ExitStack() as stack:
        files: dict[str, BufferedReader] = {}
        for name in FILES:
            try:
                files[name] = stack.enter_context((directory / name).open("rb"))
            except OSError as error:
                raise file_error("read", directory / name, error) from error
        yield _chunks(files, on_bytes)


def _chunks(
    files: dict[str, BufferedReader], on_bytes: Callable[[int], None] | None
) -> Iterator[UploadAdapterRequest]:
    for name, file in files.items():
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        yield UploadAdapterRequest(file_name=name, sha256=digest)
        while data := file.read(CHUNK_BYTES):
            yield UploadAdapterRequest(data=data)
            if on_bytes is not None:
                on_bytes(len(data))
