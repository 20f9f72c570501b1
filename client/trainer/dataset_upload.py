"""Bytes of a dataset on its way to the trainer: those of its file, or JSON lines of rows that lie in several."""

from __future__ import annotations

from collections.abc import Iterator

from stillhouse.protos.rows.reading.json_rows import as_json_lines
from stillhouse.protos.rows.reading.source import RowReader

CHUNK_BYTES = 512 * 1024
_ONE_FILE = ("JSONL", "JSON array", "CSV", "TSV", "Parquet")


def upload_of(rows: RowReader) -> tuple[str, Iterator[bytes]]:
    """Returns the file name and the content under which the trainer is to store a dataset."""
    if rows.container in _ONE_FILE:
        return rows.path.name, _content(rows)
    return f"{rows.path.stem if rows.container == 'line pairs' else rows.path.name}.jsonl", as_json_lines(
        rows.source.location, rows.raw()
    )


def _content(rows: RowReader) -> Iterator[bytes]:
    with rows.path.open("rb") as file:
        yield from iter(lambda: file.read(CHUNK_BYTES), b"")
