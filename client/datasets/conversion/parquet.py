"""Writes rows to Parquet and reads them back: typed columns, and whole rows as JSON where these do not hold them exactly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from stillhouse.protos.rows.reading.json_rows import as_json
from stillhouse.protos.rows.reading.row_error import row_error
from stillhouse.protos.rows.reading.tables import without_nulls

ROW_JSON = "row_json"
"""Column of rows that have no exact place in the others, which are null then."""
BATCH_ROWS = 1024
Rows = Iterator[tuple[int, dict[str, Any]]]
_Batch = Sequence[tuple[int, dict[str, Any]]]


def write_parquet(source: Path, rows: Callable[[], Rows], file: BinaryIO) -> int:
    """Writes the rows of `source` that each call of `rows` yields, and returns the number of those that are kept as JSON.

    Raises StillhouseError naming a row that neither columns nor JSON hold.
    """
    import pyarrow
    import pyarrow.parquet

    schema = _schema(source, rows())
    num_as_json = 0
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in _batches(rows()):
            table = _fitting(source, batch, schema)
            num_as_json += sum(ROW_JSON in each for each in table)
            writer.write_batch(pyarrow.RecordBatch.from_pylist(table, schema=schema))
    return num_as_json


def restored(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row as it was before `write_parquet`, from one that was read. Raises ValueError for a bad row_json."""
    if ROW_JSON not in values:
        return dict(values)
    kept = values[ROW_JSON]
    if kept is None:
        return {name: value for name, value in values.items() if value is not None}
    row = json.loads(kept) if isinstance(kept, str) else None
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")  # noqa: TRY004 - of the JSON, not of the argument
    return row


def _batches(rows: Rows) -> Iterator[_Batch]:
    while batch := tuple(islice(rows, BATCH_ROWS)):
        yield batch


def _schema(source: Path, rows: Rows) -> Any:
    """The types of all columns: of each batch its own, and of several the one that holds them all."""
    import pyarrow

    fields: dict[str, Any] = {}
    for batch in _batches(rows):
        names = {name: number for number, row in reversed(batch) for name in row}
        if ROW_JSON in names:
            raise row_error(
                source, names[ROW_JSON], ROW_JSON, "is a name that the conversion uses itself. Rename it."
            )
        for name in dict.fromkeys(name for _, row in batch for name in row):
            inferred = _inferred(batch, name) if _is_unicode(name) else None
            if inferred is None:
                continue
            try:
                merged = pyarrow.unify_schemas(
                    [pyarrow.schema([(name, each)]) for each in (fields.get(name, inferred), inferred)],
                    promote_options="permissive",
                )
                fields[name] = merged.field(0).type
            except pyarrow.ArrowException:
                continue  # rows of the later type are kept as JSON
    columns = [(name, each) for name, each in fields.items() if _is_writable(each)]
    return pyarrow.schema([*columns, (ROW_JSON, pyarrow.string())])


def _is_unicode(name: str) -> bool:
    """False for a name with half of a surrogate pair, which no column has."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _inferred(batch: _Batch, name: str) -> Any:
    """The type of a column in a batch, without the values that do not fit the others; None if there is none."""
    import pyarrow

    values = [row[name] for _, row in batch if row.get(name) is not None]
    try:
        return pyarrow.infer_type(values) if values else None
    except (pyarrow.ArrowException, OverflowError, UnicodeError):
        pass
    for value in values:
        try:
            return pyarrow.infer_type([value])
        except (pyarrow.ArrowException, OverflowError, UnicodeError):
            continue
    return None


def _is_writable(kind: Any) -> bool:
    """False for a type that Parquet does not hold: nothing but nulls, or an object without a field."""
    import pyarrow

    if pyarrow.types.is_null(kind):
        return False
    if pyarrow.types.is_struct(kind):
        return kind.num_fields > 0 and all(_is_writable(kind.field(at).type) for at in range(kind.num_fields))
    if pyarrow.types.is_list(kind):
        return _is_writable(kind.value_type)
    return True


def _fitting(source: Path, batch: _Batch, schema: Any) -> list[dict[str, Any]]:
    """Returns each row as it is if its columns give it back, else its JSON."""
    import pyarrow

    try:
        read = pyarrow.RecordBatch.from_pylist([row for _, row in batch], schema=schema).to_pylist()
    except (pyarrow.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
        if len(batch) == 1:
            return [_kept_as_json(source, *batch[0])]
        return [each for row in batch for each in _fitting(source, [row], schema)]
    return [
        row if _same(without_nulls(found), _without_null_fields(row)) else _kept_as_json(source, number, row)
        for (number, row), found in zip(batch, read, strict=True)
    ]


def _kept_as_json(source: Path, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    return {ROW_JSON: as_json(source, number, row).decode()}


def _without_null_fields(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row without its null fields and those of its messages, which mean that they are absent."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, list) and all(isinstance(each, dict) for each in value) and name == "messages":
            found[name] = [{key: each for key, each in one.items() if each is not None} for one in value]
        else:
            found[name] = value
    # As a table's row has it: null for the columns that it lacks.
    return {name: value for name, value in found.items() if value is not None}


def _same(read: Any, given: Any) -> bool:
    """True if two values are equal, also in their types; a whole number may have become a fraction of the same value."""
    if isinstance(read, dict) and isinstance(given, dict):
        read = {name: value for name, value in read.items() if value is not None}
        return read.keys() == given.keys() and all(_same(read[name], given[name]) for name in given)
    if isinstance(read, list) and isinstance(given, list):
        return len(read) == len(given) and all(map(_same, read, given))
    return isinstance(read, bool) == isinstance(given, bool) and bool(read == given)
