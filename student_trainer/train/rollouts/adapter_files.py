"""The student's adapter as files for rollout services, in memory where the machine has a file system for that."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stillhouse.protos.files.adapter import CONFIG, FILES
from stillhouse.student_trainer.train.student.student import Student

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - Linux's file system in memory
_ROOM = 4
"""Free space that memory must have, as a multiple of the adapter: a few versions may be in use at a time."""


@contextmanager
def saved_adapter(student: Student, memory: Path = SHARED_MEMORY) -> Iterator[Path]:
    """Saves the student's adapter as it is; the files go with the block."""
    model: Any = student.model
    size = sum(each.numel() * each.element_size() for each in model.parameters() if each.requires_grad)
    with tempfile.TemporaryDirectory(prefix="stillhouse-adapter-", dir=_folder(memory, size)) as folder:
        with _without_card(model):
            model.save_pretrained(folder)
        _sort_settings(Path(folder) / CONFIG)
        yield Path(folder)


def content_digest(adapter: Path) -> str:
    """Hex SHA-256 over the files of an adapter."""
    digest = hashlib.sha256()
    for name in FILES:
        digest.update(hashlib.sha256((adapter / name).read_bytes()).digest())
    return digest.hexdigest()


@contextmanager
def _without_card(model: Any) -> Iterator[None]:
    """Keeps peft from writing a model card inside the block, which takes longer than the weights and which no service reads."""
    model.create_or_update_model_card = lambda *_args, **_named: None
    try:
        yield
    finally:
        del model.create_or_update_model_card


def _folder(memory: Path, num_bytes: int) -> Path | None:
    """`memory` if it takes files of so many bytes; None stands for the usual folder of temporary files."""
    try:
        space = os.statvfs(memory)
    except OSError:
        return None
    has_room = space.f_bavail * space.f_frsize >= _ROOM * num_bytes
    return memory if has_room and os.access(memory, os.W_OK | os.X_OK) else None


def _sort_settings(settings: Path) -> None:
    """Rewrites an adapter's settings so that equal ones have equal bytes: peft holds sets, whose order differs by process."""
    values = json.loads(settings.read_bytes())
    ordered = {
        name: sorted(value)
        if isinstance(value, list) and all(isinstance(each, str) for each in value)
        else value
        for name, value in values.items()
    }
    settings.write_text(json.dumps(ordered, sort_keys=True))
