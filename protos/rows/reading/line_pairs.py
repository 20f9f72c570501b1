"""Reads and names pairs of text files: line n of NAME.source is the prompt, line n of NAME.target its completion."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.reading.open_file import COMPRESSED, bounded_lines, not_found, opened
from stillhouse.protos.rows.reading.row_error import NOT_UTF8, THE_LINE, OnBadRow, row_error

SIDES = ("source", "target")
ESCAPED = ".escaped"
"""File beside a pair, NAME.escaped, that says that its lines are escaped: written by `escape_line`."""
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_CHARACTERS = {value: key for key, value in _ESCAPES.items()}
_COUNT_BYTES = 1 << 20


def escape_line(text: str) -> str:
    """Returns text as one line: backslash, line feed and carriage return become two characters each."""
    return re.sub(r"[\\\n\r]", lambda found: _ESCAPES[found[0]], text)


def unescape_line(line: str) -> str:
    """Returns the text that `escape_line` made a line of. Raises ValueError for a line that it cannot have written."""
    if re.sub(r"\\[\\nr]", "", line).count("\\"):
        raise ValueError('has a backslash before another character than "\\", n and r')
    return re.sub(r"\\[\\nr]", lambda found: _CHARACTERS[found[0]], line)


def pair_of(path: Path) -> tuple[Path, Path] | None:
    """Returns the files of the pair that either of its names, or their common stem, means; None if there is no such file."""
    packed = path.suffix if path.suffix in COMPRESSED else ""
    plain = path.with_suffix("") if packed else path
    stem = plain.with_suffix("") if plain.suffix[1:] in SIDES else plain
    source, target = (stem.with_name(f"{stem.name}.{side}{packed}") for side in SIDES)
    return (source, target) if source.is_file() or target.is_file() else None


def escapes_mark(source: Path) -> Path:
    """Returns the file whose presence says that the lines of a pair are escaped."""
    plain = source.with_suffix("") if source.suffix in COMPRESSED else source
    return plain.with_suffix(ESCAPED)


def read_pairs(path: Path, refuse: OnBadRow) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields line number, prompt and completion of each line.

    Raises StillhouseError: DATASET_NOT_FOUND if one file is missing, DATASET_INVALID for unequal counts of lines, before
    the first row is yielded.
    """
    pair = pair_of(path)
    if pair is None:
        raise not_found(str(path))
    for each in pair:
        if not each.is_file():
            other = pair[0] if each == pair[1] else pair[1]
            raise StillhouseError(
                Reason.DATASET_NOT_FOUND,
                f"{other} is one file of a pair, and {each}, the other one, is missing. Write it, or rename the file.",
                resource=str(each),
            )
    counts = [_count_lines(each) for each in pair]
    if counts[0] != counts[1]:
        raise StillhouseError(
            Reason.DATASET_INVALID,
            f"{pair[0]} has {counts[0]} lines and {pair[1]} has {counts[1]}; each prompt needs its completion in the "
            "line of the same number.",
        )
    is_escaped = escapes_mark(pair[0]).is_file()
    with opened(pair[0]) as sources, opened(pair[1]) as targets:
        lines = zip(bounded_lines(pair[0], sources), bounded_lines(pair[1], targets), strict=True)
        for (number, prompt), (_, completion) in lines:
            values: dict[str, Any] = {}
            for file, name, line in zip(pair, ("prompt", "completion"), (prompt, completion), strict=True):
                try:
                    text = (
                        line.decode("utf-8-sig" if number == 1 else "utf-8")
                        .removesuffix("\n")
                        .removesuffix("\r")
                    )
                    values[name] = unescape_line(text) if is_escaped else text
                except UnicodeDecodeError as error:
                    refuse(row_error(file, number, THE_LINE, NOT_UTF8.format(error.start)))
                    break
                except ValueError as error:
                    refuse(row_error(file, number, THE_LINE, f"cannot be read: {error}. Write it again."))
                    break
            else:
                yield number, values


def _count_lines(path: Path) -> int:
    """Counts lines; the last one may lack its line break."""
    count, last = 0, b"\n"
    with opened(path) as file:
        while data := file.read(_COUNT_BYTES):
            count += data.count(b"\n")
            last = data[-1:]
    return count + (last != b"\n")
