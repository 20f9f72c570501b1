"""Writes rows to Parquet and reads them back: typed columns, and whole rows as JSON where these do not hold them exactly."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, BinaryIO

from stillhouse.client.core.errors import usage_error
from stillhouse.protos.rows.reading.tables import without_nulls

ROW_JSON = "row_json"
"""Column of rows that have no exact place in the others, which are null then."""
BATCH_ROWS = 1024


def write_parquet(rows: Callable[[], Iterator[Mapping[str, Any]]], file: BinaryIO) -> int:
    """Writes the rows that each call of `rows` yields, and returns the number of those that are kept as JSON."""
    import pyarrow
    import pyarrow.parquet

    schema = _schema(rows())
    num_as_json = 0
    with pyarrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        for batch in _batches(rows()):
            table = _fitting(batch, schema)
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


def _batches(rows: Iterator[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], ...]]:
    while batch := tuple(islice(rows, BATCH_ROWS)):
        yield batch


def _schema(rows: Iterator[Mapping[str, Any]]) -> Any:
    """The types of all columns: of each batch its own, and of several the one that holds them all."""
    import pyarrow

    fields: dict[str, Any] = {}
    for batch in _batches(rows):
        names = dict.fromkeys(name for row in batch for name in row)
        for name in names:
            if name == ROW_JSON:
                raise usage_error(
                    f"a row has the field {ROW_JSON}, which the conversion uses itself. Rename it."
                )
            inferred = _inferred(batch, name)
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


def _inferred(batch: tuple[Mapping[str, Any], ...], name: str) -> Any:
    """The type of a column in a batch, without the values that do not fit the others; None if there is none."""
    import pyarrow

    values = [row[name] for row in batch if row.get(name) is not None]
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


def _fitting(batch: Sequence[Mapping[str, Any]], schema: Any) -> list[dict[str, Any]]:
    """Returns each row as it is if its columns give it back, else its JSON."""
    import pyarrow

    rows = [dict(row) for row in batch]
    try:
        read = pyarrow.RecordBatch.from_pylist(rows, schema=schema).to_pylist()
    except (pyarrow.ArrowException, OverflowError, UnicodeError, TypeError, ValueError):
        if len(rows) == 1:
            return [_as_json(rows[0])]
        return [each for row in rows for each in _fitting([row], schema)]
    return [
        row if _same(without_nulls(found), _without_null_fields(row)) else _as_json(row)
        for row, found in zip(rows, read, strict=True)
    ]


def _as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    return {ROW_JSON: json.dumps(row)}


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
