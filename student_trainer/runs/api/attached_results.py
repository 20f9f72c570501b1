"""Stores results that were computed elsewhere among a run's artifacts: small JSON objects, under plain names."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.stillhouse.v1.run_pb2 import Artifact, AttachResultRequest

FOLDER = "evaluations/attached"
MAX_BYTES = 512 * 1024
MAX_RESULTS = 100
"""Results of one run."""
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}\.json")


def attach(run_path: Path, request: AttachResultRequest) -> Artifact:
    """Stores the result and returns it as an artifact.

    Raises StillhouseError: INVALID_REQUEST for a name or content that is not of this kind, QUOTA for one too many.
    """
    name, data = request.file_name, request.data
    if not _NAME.fullmatch(name):
        raise StillhouseError(
            Reason.INVALID_REQUEST,
            f"file_name {name[:80]!r} is not a plain name that ends in .json; use letters, digits, '.', '_' and '-'.",
        )
    if len(data) > MAX_BYTES:
        raise StillhouseError(
            Reason.INVALID_REQUEST,
            f"The result {name} has {len(data)} bytes; the limit is {MAX_BYTES}. Leave out the samples of single rows.",
        )
    try:
        is_object = isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise StillhouseError(
            Reason.INVALID_REQUEST, f"The result {name} is not a JSON object; write one, in UTF-8."
        )
    folder = run_path / FOLDER
    if not run_path.is_dir():
        raise StillhouseError(
            Reason.RUN_NOT_FOUND, f"The files of {run_path.name} are gone; see `stillhouse run list`."
        )
    folder.mkdir(parents=True, exist_ok=True)
    others = [each for each in folder.iterdir() if each.name != name]
    if len(others) >= MAX_RESULTS:
        raise StillhouseError(
            Reason.QUOTA,
            f"The run has {len(others)} results, the most that it can have; replace one of them under its name.",
        )
    write_atomic(folder / name, data)
    digest = hashlib.sha256(data).hexdigest()
    return Artifact(path=f"{FOLDER}/{name}", size_bytes=len(data), sha256=digest)
