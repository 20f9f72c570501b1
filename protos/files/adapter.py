"""The two files of a LoRA adapter, the base beside them, and their upload in chunks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from stillhouse.protos.stillhouse.v1.teacher_pb2 import UploadAdapterRequest

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
"""In the order in which they are uploaded."""
BASE = "base"
"""Folder beside them with the adapter's base, where that was cut or began as random numbers and is nowhere else."""
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


def base_beside(directory: Path) -> Path | None:
    """Returns the directory of the base that lies beside an adapter, if there is one."""
    base = directory / BASE
    return base if (base / "config.json").is_file() else None


def name_base(directory: Path, place: Path) -> None:
    """Names the base beside an adapter in its configuration, by the absolute path that it has once `directory` is at `place`."""
    path = directory / CONFIG
    values = json.loads(path.read_bytes()) | {"base_model_name_or_path": str(place.resolve() / BASE)}
    path.write_text(json.dumps(values, indent=2))
