"""Fields that a format has no place for, in a file beside the output, so that converting back gives the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stillhouse.client.datasets.row_files import rows_of
from stillhouse.protos.errors import Reason, StillhouseError

SUFFIX = ".fields.jsonl"


def companion_of(path: Path) -> Path:
    """Returns the companion's path: NAME.jsonl.fields.jsonl beside NAME.jsonl."""
    return path.with_name(path.name + SUFFIX)


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
        yield number, values, other[1]
    if next(others, None) is not None:
        raise _unequal(path, companion, f"more than {count} rows")


def _unequal(path: Path, companion: Path, what: str) -> StillhouseError:
    return StillhouseError(
        Reason.DATASET_INVALID,
        f"{companion} has {what}, which is not what {path} has; convert the rows again, or remove {companion.name} to do "
        "without their other fields.",
    )
