"""Reads JSON lines and JSON arrays of objects, row by row: memory holds one row, however long the file is."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.field_error import kind_of
from stillhouse.protos.rows.reading.open_file import MAX_ROW_BYTES, bounded_lines
from stillhouse.protos.rows.reading.row_error import THE_LINE, OnBadRow, row_error, unreadable
from stillhouse.protos.rows.reading.unique_names import GIVEN_TWICE, UniqueNames, shown_name

_CHUNK_BYTES = 1 << 18
_BLANKS = " \t\r\n"


def read_json_lines(
    path: Path, file: io.BufferedReader, refuse: OnBadRow
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields line number and object of each line that is not blank."""
    decoder = UniqueNames()
    for number, line in bounded_lines(path, file):
        if not line.strip():
            continue
        try:
            # Not by the bytes, of which the library would guess UTF-16 for one line and not for the next.
            values = decoder.parse(line.decode("utf-8-sig", "surrogatepass"))
        except UnicodeDecodeError as error:
            refuse(row_error(path, number, THE_LINE, f"is not UTF-8 (byte {error.start}). Save it as UTF-8."))
            continue
        except (ValueError, RecursionError) as error:
            refuse(
                row_error(
                    path,
                    number,
                    THE_LINE,
                    f"is not JSON ({error}); write one JSON object per line, or an array.",
                )
            )
            continue
        if decoder.repeated is not None:
            refuse(row_error(path, number, shown_name(decoder.repeated), GIVEN_TWICE))
        elif isinstance(values, dict):
            yield number, values
        else:
            refuse(row_error(path, number, THE_LINE, f"is {kind_of(values)}; it must be a JSON object."))


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
        if window.decoder.repeated is not None:
            refuse(row_error(path, number, shown_name(window.decoder.repeated), GIVEN_TWICE))
        elif isinstance(values, dict):
            yield number, values
        else:
            refuse(row_error(path, number, THE_LINE, f"is {kind_of(values)}; it must be a JSON object."))
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
        self.decoder = UniqueNames()

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
                        f"is not JSON ({error}); write an array of JSON objects.",
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
            raise unreadable(self._path, f"JSON array, at row {number},", error) from error
        self._text, self._at = self._text[self._at :] + text, 0
        return not self._is_ended or bool(text)


def no_json(error: TypeError) -> StillhouseError:
    """Returns the error of a row of a table with a value that JSON does not hold, such as a date."""
    return StillhouseError(
        Reason.DATASET_INVALID,
        f"a row cannot be written as JSON ({error}). Write the column as text or as numbers, or remove it.",
    )


def as_json_lines(rows: Iterable[tuple[int, Mapping[str, Any]]]) -> Iterator[bytes]:
    """Yields rows as JSON lines, in pieces of about _CHUNK_BYTES. Raises StillhouseError(DATASET_INVALID)."""
    pieces: list[bytes] = []
    size = 0
    for _, values in rows:
        try:
            pieces.append(json.dumps(values, separators=(",", ":")).encode() + b"\n")
        except TypeError as error:
            raise no_json(error) from error
        size += len(pieces[-1])
        if size >= _CHUNK_BYTES:
            yield b"".join(pieces)
            pieces, size = [], 0
    if pieces:
        yield b"".join(pieces)
