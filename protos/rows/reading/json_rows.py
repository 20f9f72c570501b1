"""Reads JSON lines and JSON arrays of objects, row by row: memory holds one row, however long the file is."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stillhouse.protos.rows.field_error import FieldError, kind_of
from stillhouse.protos.rows.reading.open_file import MAX_ROW_BYTES, bounded_lines
from stillhouse.protos.rows.reading.row_error import NOT_UTF8, THE_LINE, OnBadRow, row_error
from stillhouse.protos.rows.reading.strict_json import (
    NOT_FINITE,
    StrictJson,
    is_finite,
    shown_name,
    why_not_json,
)

_CHUNK_BYTES = 1 << 18
_BLANKS = " \t\r\n"
_NO_OBJECT = "is {}; it must be a JSON object."


def read_json_lines(
    path: Path, file: io.BufferedReader, refuse: OnBadRow
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields line number and object of each line that is not blank."""
    decoder = StrictJson()
    for number, line in bounded_lines(path, file):
        if not line.strip():
            continue
        try:
            # Not by the bytes, of which the library would guess UTF-16 for one line and not for the next.
            values = decoder.parse(line.decode("utf-8-sig", "surrogatepass"))
        except UnicodeDecodeError as error:
            refuse(row_error(path, number, THE_LINE, NOT_UTF8.format(error.start)))
            continue
        except (ValueError, RecursionError) as error:
            refuse(
                row_error(
                    path,
                    number,
                    THE_LINE,
                    why_not_json(error, "write one JSON object per line, or an array"),
                )
            )
            continue
        if decoder.fault is not None:
            refuse(row_error(path, number, decoder.fault.field, decoder.fault.problem))
        elif isinstance(values, dict):
            yield number, values
        else:
            refuse(
                row_error(
                    path, number, THE_LINE, _NO_OBJECT.format("null" if values is None else kind_of(values))
                )
            )


def read_json_array(
    path: Path, file: io.BufferedReader, refuse: OnBadRow
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number, from 1, and object of each element of an array.

    Libraries that stream JSON change escaped halves of surrogate pairs silently; the standard library's parser, applied
    to one element after the other, keeps them, so that the row can be refused.
    """
    window = _Window(path, file)
    window.expect("[", 0)
    number = 0
    while (found := window.next_character(number + 1)) != "]":
        if number:
            window.expect(",", number)
        number += 1
        if found == "":
            raise row_error(path, number, THE_LINE, 'is missing: the array has no end. Close it with "]".')
        values = window.element(number)
        if (fault := window.decoder.fault) is not None:
            refuse(row_error(path, number, fault.field, fault.problem))
        elif isinstance(values, dict):
            yield number, values
        else:
            refuse(
                row_error(
                    path, number, THE_LINE, _NO_OBJECT.format("null" if values is None else kind_of(values))
                )
            )
    window.expect("]", number)
    if window.next_character(number):
        raise row_error(path, number, THE_LINE, "is followed by text behind the array. Remove it.")


class _Window:
    """Text of a file from the first character that is not read yet."""

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self._path = path
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._is_ended = False
        self._read = 0
        """Bytes before those that are decoded next."""
        self.decoder = StrictJson()

    def next_character(self, number: int) -> str:
        """Returns the next character that is not blank; empty at the end. `number` is the row that it may begin."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _BLANKS:
                    return self._text[self._at]
                self._at += 1
            if not self._more(number):
                return ""

    def expect(self, character: str, number: int) -> None:
        """Passes over one character. Raises StillhouseError(DATASET_INVALID) for any other."""
        found = self.next_character(number)
        if found != character:
            what = f'"{found}"' if found else "the end of the file"
            raise row_error(
                self._path,
                number,
                THE_LINE,
                f'is followed by {what} in place of "{character}"; write a JSON array.',
            )
        self._at += 1

    def element(self, number: int) -> Any:
        """Returns the next element. Raises StillhouseError(DATASET_INVALID) for one that is no JSON or too long."""
        self.next_character(number)
        while True:
            try:
                value, end = self.decoder.parse_at(self._text, self._at)
            except (ValueError, RecursionError) as error:
                is_long = len(self._text) - self._at > MAX_ROW_BYTES
                if is_long or isinstance(error, RecursionError) or not self._more(number):
                    raise row_error(
                        self._path,
                        number,
                        THE_LINE,
                        why_not_json(error, "write an array of JSON objects"),
                    ) from error
            else:
                if end < len(self._text) or not self._more(number):  # a number may go on
                    self._at = end
                    return value

    def _more(self, number: int) -> bool:
        """Reads on, each time twice as much as is left, so that parsing again costs no more than reading."""
        if self._is_ended:
            return False
        data = self._file.read(max(_CHUNK_BYTES, len(self._text) - self._at))
        self._is_ended = not data
        try:
            text = self._decoder.decode(data, final=self._is_ended)
        except UnicodeDecodeError as error:
            raise row_error(
                self._path, max(number, 1), THE_LINE, NOT_UTF8.format(self._read + error.start)
            ) from error
        self._read += len(data)
        self._text, self._at = self._text[self._at :] + text, 0
        return not self._is_ended or bool(text)


def no_json(values: Mapping[str, Any]) -> FieldError:
    """Returns the error of a row of a table with a value that JSON does not hold, such as a date or NaN."""
    for name, value in values.items():
        if not is_finite(value):
            return FieldError(shown_name(name), NOT_FINITE.format("NaN or an infinite number"))
        try:
            json.dumps(value)
        except TypeError as error:
            kind = str(error).removeprefix("Object of type ").removesuffix(" is not JSON serializable")
            return FieldError(
                shown_name(name),
                f"holds a {kind}, which JSON does not. Write the column as text or as numbers, or remove it.",
            )
    raise AssertionError("all fields are JSON")


def as_json_lines(path: Path | str, rows: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[bytes]:
    """Yields the rows of `path` as JSON lines, in pieces of about _CHUNK_BYTES. Raises StillhouseError(DATASET_INVALID)."""
    pieces: list[bytes] = []
    size = 0
    for number, values in rows:
        pieces.append(as_json(path, number, values) + b"\n")
        size += len(pieces[-1])
        if size >= _CHUNK_BYTES:
            yield b"".join(pieces)
            pieces, size = [], 0
    if pieces:
        yield b"".join(pieces)


def as_json(path: Path | str, number: int, values: Mapping[str, Any]) -> bytes:
    """Returns a row of `path` as JSON in ASCII. Raises StillhouseError(DATASET_INVALID)."""
    try:
        return json.dumps(values, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError):
        problem = no_json(values)
        raise row_error(path, number, problem.field, problem.problem) from problem
