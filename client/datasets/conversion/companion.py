"""Fields that a format has no place for, in a file beside the output, so that converting back gives the same rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stillhouse.client.datasets.row_files import rows_of
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.field_error import FieldError

SUFFIX = ".fields.jsonl"
ROW_SHA256 = "row_sha256"
"""Field of a companion's row that tells to which row it belongs."""


def companion_of(path: Path) -> Path:
    """Returns the companion's path: NAME.jsonl.fields.jsonl beside NAME.jsonl."""
    return path.with_name(path.name + SUFFIX)


def companion_row(fields: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the companion's row of other `fields` of `row`. Raises FieldError for a field of the companion's own name."""
    if ROW_SHA256 in fields:
        raise FieldError(ROW_SHA256, "is a name that the conversion uses itself. Rename it.")
    return {**fields, ROW_SHA256: _digest(row)}


def with_companion(
    path: Path, rows: Iterator[tuple[int, Mapping[str, Any]]]
) -> Iterator[tuple[int, Mapping[str, Any], Mapping[str, Any]]]:
    """Yields number, fields and companion fields of each row. Raises StillhouseError if the two differ in their rows."""
    companion = companion_of(path)
    others = rows_of(companion)
    count = 0
    for number, values in rows:
        count += 1
        other = next(others, None)
        if other is None:
            raise _unequal(path, companion, f"no row {count}")
        # A companion of an earlier version has no digests.
        if other[1].pop(ROW_SHA256, digest := _digest(values)) != digest:
            raise _unequal(path, companion, f"the fields of another row {count}")
        yield number, values, other[1]
    if next(others, None) is not None:
        raise _unequal(path, companion, f"more than {count} rows")


def _digest(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:16]


def _unequal(path: Path, companion: Path, what: str) -> StillhouseError:
    return StillhouseError(
        Reason.DATASET_INVALID,
        f"{companion} has {what}, which is not what {path} has; convert the rows again, or remove {companion.name} to do "
        "without their other fields.",
    )
