"""Reads the rows of JSONL and Parquet files; errors name file, row and field. JSONL is streamed, Parquet memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.rows.field_error import FieldError, kind_of
from stillhouse.protos.rows.known_fields import ExtraFields
from stillhouse.protos.rows.training_row import parse_training_row


def read_file(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number and fields of each row of a file; numbers are lines of JSONL or rows of a table, from 1.

    Raises StillhouseError(DATASET_INVALID) naming file and row.
    """
    return _read_parquet(path) if _is_parquet(path) else _read_json_lines(path)


def check_file(path: Path, *, extra_fields: ExtraFields) -> int:
    """Checks that every row of a file can be trained on, and returns their number. Raises StillhouseError(DATASET_INVALID)."""
    number = count = 0
    for number, values in read_file(path):
        try:
            parse_training_row(values, extra_fields=extra_fields)
        except FieldError as error:
            raise row_error(path, number, error.field, error.problem) from error
        count += 1
    if not count:
        raise StillhouseError(Reason.DATASET_INVALID, f"{path} has no rows. Write one JSON object per line.")
    return count


def row_error(path: Path, number: int, field: str, problem: str) -> StillhouseError:
    """Returns the DATASET_INVALID error for a field of a row; `problem` also says the remedy."""
    return StillhouseError(
        Reason.DATASET_INVALID,
        f"{path}, row {number}, field {field}: {problem}",
        metadata={"path": str(path), "row": str(number), "field": field},
    )


def unreadable(path: Path, what: str, error: BaseException) -> StillhouseError:
    """Returns the DATASET_INVALID error for a file that is not what it seems to be."""
    return StillhouseError(
        Reason.DATASET_INVALID,
        f"{path} cannot be read as a {what} ({first_line(error)}). Write it again, or give a JSONL file.",
    )


def _read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise row_error(
                    path, number, "(the line)", f"is not JSON ({error}); write one JSON object per line."
                ) from error
            if not isinstance(values, dict):
                raise row_error(
                    path, number, "(the line)", f"is {kind_of(values)}; it must be a JSON object."
                )
            yield number, values


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(batch_size=1024):
                for index in range(batch.num_rows):
                    number += 1
                    with unicode_rows(path, number):
                        (values,) = batch.slice(index, 1).to_pylist()
                    yield number, without_nulls(values)
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, "Parquet", error) from error


@contextmanager
def unicode_rows(path: Path, number: int) -> Iterator[None]:
    """Raises StillhouseError(DATASET_INVALID) for a row of a table whose text is not UTF-8."""
    try:
        yield
    except UnicodeDecodeError as error:
        problem = f"has text that is not UTF-8 ({error}). Write it again in UTF-8."
        raise row_error(path, number, "(the row)", problem) from error


def without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a table's row without the nulls that its columns force on messages, calls and tools that lack a field."""
    return {name: _dense(value) for name, value in values.items()}


def _dense(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _dense(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_dense(each) for each in value]
    return value


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".parquet" or file.read(4) == b"PAR1"
