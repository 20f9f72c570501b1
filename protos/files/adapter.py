"""The two files of a LoRA adapter, and their upload in chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from stillhouse.protos.stillhouse.v1.teacher_pb2 import UploadAdapterRequest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
"""In the order in which they are uploaded."""
CHUNK_BYTES = 512 * 1024


def upload_requests(
    directory: Path, on_bytes: Callable[[int], None] = lambda _: None
) -> Iterator[UploadAdapterRequest]:
    """Yields the requests that carry the adapter in `directory`; no other file of it is read."""
    for name in FILES:
        with (directory / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            yield UploadAdapterRequest(file_name=name, sha256=digest)
            while data := file.read(CHUNK_BYTES):
                yield UploadAdapterRequest(data=data)
                on_bytes(len(data))
