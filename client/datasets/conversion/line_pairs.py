"""Writes and reads pairs of .source and .target files, a line a row, in which line breaks are escaped."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stillhouse.client.core.errors import file_errors
from stillhouse.client.datasets.conversion.companion import companion_of, companion_row, with_companion
from stillhouse.client.datasets.conversion.forms import from_pair, to_pair
from stillhouse.client.datasets.row_files import RowSpool, json_line, no_rows, whole_files
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.reading.line_pairs import ESCAPED, escape_line, unescape_line
from stillhouse.protos.rows.reading.row_error import row_error

SOURCE, TARGET = ".source", ".target"


def pair_stem(path: Path) -> Path:
    """Returns NAME of NAME.source and NAME.target, given any of the three."""
    return path.with_suffix("") if path.suffix in (SOURCE, TARGET) else path


def _beside(path: Path, suffix: str) -> Path:
    stem = pair_stem(path)
    return stem.with_name(stem.name + suffix)


def write_pairs(
    rows: Callable[[], Iterator[tuple[int, dict[str, Any]]]],
    source: Path,
    out: Path,
    *,
    legacy_newlines: bool,
) -> tuple[int, list[Path]]:
    """Writes the `rows` of `source` as OUT.source and OUT.target, sorted by id if all have one; returns count and files.

    OUT.escaped marks the escapes and OUT.source.fields.jsonl keeps the other fields, also the order. With `legacy_newlines` there is
    neither: line breaks are written as they are, and the pair cannot be read again. Raises StillhouseError naming the row.
    """
    outputs = [_beside(out, SOURCE), _beside(out, TARGET)]
    marks = [_beside(out, ESCAPED), companion_of(outputs[0])]
    stale = marks if legacy_newlines else []
    if not legacy_newlines:
        outputs += marks
    with RowSpool(out.parent) as spool, whole_files(outputs, inputs=[source], stale=stale) as files:
        ids: list[Any] = []
        for number, values in rows():
            try:
                to_pair(values)  # so that a row that cannot be one is named by its number in the file
                ids.append(_sortable(values))
                spool.add(json_line(values))
            except FieldError as error:
                raise row_error(source, number, error.field, error.problem) from error
        if not len(spool):
            raise no_rows(source)
        for index in _order(source, ids):
            _write(files, index, spool.line(index), is_escaped=not legacy_newlines)
    return len(ids), outputs


def _write(files: list[Any], index: int, line: bytes, *, is_escaped: bool) -> None:
    source, target, record = to_pair(json.loads(line))
    for file, text in zip(files, (source, target), strict=False):
        shown = escape_line(text) if is_escaped else text
        # Half of a surrogate pair has no UTF-8: readers refuse such a line, and read_pairs gives it back.
        file.write(shown.encode("utf-8", "surrogatepass") + b"\n")
    if is_escaped:
        beside = companion_row({"row": index, **record}, {"source": source, "target": target})
        files[3].write(json_line(beside))


def _sortable(values: Mapping[str, Any]) -> tuple[int, Any] | None:
    """Returns an id as numbers before texts; None without one. Raises FieldError."""
    name = values.get("id")
    if name is None:
        return None
    if isinstance(name, bool) or not isinstance(name, str | int):
        raise FieldError("id", "is neither text nor a whole number. Write it as text.")
    return (0, name) if isinstance(name, int) else (1, name)


def _order(source: Path, ids: list[Any]) -> list[int]:
    """Returns the rows in the order of their ids, or of the file if one has none. Raises StillhouseError for one twice."""
    if None in ids:
        return list(range(len(ids)))
    order = sorted(range(len(ids)), key=ids.__getitem__)
    for first, second in itertools.pairwise(order):
        if ids[first] == ids[second]:
            raise row_error(
                source,
                second + 1,
                "id",
                f"is {ids[second][1]!r}, as that of row {first + 1}. Give each row an id of its own.",
            )
    return order


def read_pairs(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows from which `write_pairs` made a pair, in the order of the pair. Raises StillhouseError."""
    pair = [_beside(path, SOURCE), _beside(path, TARGET)]
    for number, texts, record in with_companion(pair[0], _lines(pair)):
        try:
            yield {**from_pair(texts["source"], texts["target"], record), "row": record.get("row")}
        except FieldError as error:
            raise row_error(companion_of(pair[0]), number, error.field, error.problem) from error


def _lines(pair: list[Path]) -> Iterator[tuple[int, Mapping[str, str]]]:
    with file_errors("read", pair[0]), pair[0].open("rb") as sources, pair[1].open("rb") as targets:
        number = 0
        while True:
            number += 1
            lines = [sources.readline(), targets.readline()]
            if not any(lines):
                return
            texts = [_text(file, number, line) for file, line in zip(pair, lines, strict=True)]
            yield number, {"source": texts[0], "target": texts[1]}


def _text(file: Path, number: int, line: bytes) -> str:
    problem = "is missing, though the other file of the pair has it"
    if line:
        try:
            return unescape_line(line.decode("utf-8", "surrogatepass").removesuffix("\n"))
        except ValueError as error:
            problem = str(error)
    raise row_error(file, number, "(the line)", f"{problem}. Convert the rows again.")
