"""Identity of a run's teachers in its directory: written once, compared at every connection."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    CAPABILITY_CLASSES,
    CAPABILITY_GENERATION_ONLY,
    GetTeacherInfoResponse,
)
from stillhouse.student_trainer.run_dir import RunDir

_NAMES = ("model_fingerprint", "adapter", "adapter_fingerprint", "tokenizer_fingerprint")
"""Runs of earlier versions lack the last one."""
_COMPARED = ("model_fingerprint", "adapter_fingerprint", "tokenizer_fingerprint")


def changed(known: Mapping[str, str], found: Mapping[str, str]) -> str:
    """The first part by which two teachers differ; empty if none. A part that one of them lacks is not compared."""
    for part in _COMPARED:
        ours, theirs = known.get(part), found.get(part)
        if ours != theirs and ours is not None and theirs is not None:
            return part
    return ""


def check_stored_identity(
    run_dir: RunDir, name: str, identity: Mapping[str, str], *, model: str, place: str
) -> None:
    """Returns if `place` holds results of the teacher that the run began with; the first one is written down.

    Raises:
        StillhouseError: TEACHER_CHANGED.
    """
    known = read_identity(run_dir, name)
    if known is None:
        write_identity(run_dir, name, {**identity, "model": model})
        return
    part = changed(known, identity)
    if part:
        raise StillhouseError(
            Reason.TEACHER_CHANGED,
            f"{place} holds answers of another teacher than the one that this run began with: its {part} is "
            f"{identity[part]}, and was {known[part]}. Name the cache of the former teacher, or create a new run.",
            metadata={"expected": known[part], "found": identity[part]},
        )


def write_identity(run_dir: RunDir, name: str, identity: Mapping[str, str]) -> None:
    """Writes the identity of the teacher `name`, next to those of other names."""
    content: dict[str, Any] = dict(identity)
    if name:
        with suppress(FileNotFoundError):
            content = json.loads(run_dir.teacher_path.read_bytes())
        content = (
            {**content, name: dict(identity)}
            if "model_fingerprint" not in content
            else {name: dict(identity)}
        )
    write_atomic(run_dir.teacher_path, json.dumps(content).encode())


def read_identity(run_dir: RunDir, name: str) -> dict[str, str] | None:
    """Reads the identity of the teacher `name`; None if none was reached yet. Raises CHECKPOINT_CORRUPT."""
    try:
        value = json.loads(run_dir.teacher_path.read_bytes())
        if name:
            value = value.get(name)
            if value is None:
                return None
        wanted = [part for part in _NAMES if part != "tokenizer_fingerprint" or part in value]
        return {part: str(value[part]) for part in wanted}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StillhouseError(
            Reason.CHECKPOINT_CORRUPT,
            f"{run_dir.teacher_path} cannot be read ({error}). Delete it to accept the teacher that answers now.",
        ) from error


def adapter_fingerprint(info: GetTeacherInfoResponse, adapter: str, target: str) -> str:
    """Fingerprint of a loaded adapter; empty for the base model. Raises StillhouseError(ADAPTER_NOT_FOUND)."""
    if not adapter:
        return ""
    for each in info.adapters:
        if each.name == adapter:
            return each.fingerprint
    loaded = ", ".join(each.name for each in info.adapters) or "none"
    raise StillhouseError(
        Reason.ADAPTER_NOT_FOUND,
        f'The teacher at {target} has no adapter "{adapter}"; loaded: {loaded}. Load it, or correct the adapter of this teacher in the run file.',
        resource=adapter,
    )


def require_kind(info: GetTeacherInfoResponse, target: str, *, classes: bool) -> None:
    """Raises StillhouseError(CAPABILITY) for a teacher of another kind than the run needs: language model or classifier, one that scores."""
    if CAPABILITY_GENERATION_ONLY in info.capabilities:
        raise StillhouseError(
            Reason.CAPABILITY,
            f"The teacher at {target} ({info.model}, {info.engine}) generates and does not score, which runs need. Capture what it "
            "generates with `stillhouse generate --capture` and train from that, or name another teacher.",
            metadata={"capability": "CAPABILITY_GENERATION_ONLY"},
        )
    if classes == (CAPABILITY_CLASSES in info.capabilities):
        return
    found, task = ("language model", "distil") if classes else ("classifier", "sequence_classification")
    wanted = "a classifier" if classes else "a language model"
    raise StillhouseError(
        Reason.CAPABILITY,
        f"The teacher at {target} ({info.model}) is a {found}, and this run needs {wanted}. Set task: {task}, or name another "
        "teacher.",
        metadata={"capability": "CAPABILITY_CLASSES"},
    )
