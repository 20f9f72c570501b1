"""Checks that every row of a source can be trained on."""

from __future__ import annotations

from pathlib import Path

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.known_fields import ExtraFields
from stillhouse.protos.rows.reading.row_error import row_error as row_error  # noqa: PLC0414 - re-exported
from stillhouse.protos.rows.reading.source import RowReader, RowSource
from stillhouse.protos.rows.training_row import parse_training_row


def read_file(path: Path | str) -> RowReader:
    """Returns the reader of a file's rows, in known fields. Raises StillhouseError."""
    return RowReader(RowSource(location=str(path)))


def check_file(path: Path, *, extra_fields: ExtraFields) -> int:
    """Checks that every row of a file can be trained on, and returns their number. Raises StillhouseError(DATASET_INVALID)."""
    return check_rows(read_file(path), extra_fields=extra_fields)


def check_rows(rows: RowReader, *, extra_fields: ExtraFields) -> int:
    """As check_file, for a source of any kind."""
    count = learnt = 0
    where = rows.source.location
    for number, values in rows:
        try:
            turns = parse_training_row(values, extra_fields=extra_fields).turns
        except FieldError as error:
            raise row_error(where, number, error.field, error.problem) from error
        count += 1
        learnt += turns is None or any(turns.trained)
    if not count:
        raise StillhouseError(Reason.DATASET_INVALID, f"{where} has no rows. Write one JSON object per line.")
    if not learnt:
        raise StillhouseError(
            Reason.DATASET_INVALID,
            f"{where} has nothing to train on: every turn of the assistant has weight 0 (rows: {count}). Leave weight out of a "
            "turn to learn.",
        )
    return count
