"""Reads CSV and TSV whose first line names the columns; an empty cell is an absent field."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.protos.rows.known_fields import SETTINGS
from stillhouse.protos.rows.reading.open_file import MAX_ROW_BYTES, bounded_lines
from stillhouse.protos.rows.reading.row_error import NOT_UTF8, THE_LINE, OnBadRow, row_error

_NUMBERS = {*SETTINGS, "weight"} - {"stop", "adapter"}
"""Columns of numbers; all others are text."""
_MAX_ROW_LINES = 1 << 20
"""Lines of one row, within quotes."""


def read_delimited(
    path: Path, file: io.BufferedReader, refuse: OnBadRow, *, delimiter: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the line in which a row begins, and its cells that are not empty, by the names of the columns.

    Text in double quotes may hold delimiters, line breaks, and quotes written twice.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    begin = _RowBegin()
    rows = csv.reader(_texts(path, file, begin), delimiter=delimiter, strict=True)
    names: list[str] = []
    first_line = 1
    while True:
        begin.line = first_line
        try:
            cells = next(rows, None)
        except csv.Error as error:
            raise row_error(
                path,
                first_line,
                THE_LINE,
                f"is not {_name(delimiter)} ({error}); close its quotes, and write quotes twice.",
            ) from error
        if cells is None:
            return
        number, first_line = first_line, rows.line_num + 1
        if not any(cells):
            continue
        if not names:
            names = _names(path, number, cells, delimiter)
        elif len(cells) != len(names):
            refuse(
                row_error(
                    path,
                    number,
                    THE_LINE,
                    f"has {len(cells)} cells, and the first line names {len(names)} columns; quote cells that hold a "
                    "delimiter.",
                )
            )
        else:
            yield number, {name: _value(name, cell) for name, cell in zip(names, cells, strict=True) if cell}


@dataclass(slots=True)
class _RowBegin:
    line: int = 1
    """Line in which the row that is being read begins."""


def _texts(path: Path, file: io.BufferedReader, begin: _RowBegin) -> Iterator[str]:
    for number, line in bounded_lines(path, file):
        if number - begin.line >= _MAX_ROW_LINES:
            raise row_error(
                path,
                begin.line,
                THE_LINE,
                f"does not end within {_MAX_ROW_LINES} lines; close its quotes, and write quotes twice.",
            )
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise row_error(path, number, THE_LINE, NOT_UTF8.format(error.start)) from error


def _names(path: Path, number: int, cells: Sequence[str], delimiter: str) -> list[str]:
    """Checks the first line. Raises StillhouseError(DATASET_INVALID)."""
    names = [cell.strip() for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if "" in names or twice:
        problem = f"names the column {twice!r:.60} twice" if twice else "has a column without a name"
        raise row_error(path, number, THE_LINE, f"{problem}; give each column a name of its own.")
    if len(names) == 1 and (other := next((each for each in ",;\t|" if each in names[0]), None)):
        raise row_error(
            path,
            number,
            THE_LINE,
            f"names one column, {names[0]!r:.60}, and is not delimited by {delimiter!r}; write commas in a .csv file and "
            f"tabs in a .tsv file, not {other!r}.",
        )
    return names


def _value(name: str, cell: str) -> Any:
    if name in _NUMBERS:
        try:
            number = json.loads(cell)
        except ValueError:
            return cell
        if isinstance(number, int | float) and math.isfinite(number):
            return number
    return cell


def _name(delimiter: str) -> str:
    return "TSV" if delimiter == "\t" else "CSV"
