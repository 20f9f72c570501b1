"""Opens a file of rows, compressed or not, and finds its container from its first bytes and its name."""

from __future__ import annotations

import gzip
import io
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.reading.row_error import THE_LINE, row_error, unreadable

Container = Literal[
    "JSONL", "JSON array", "CSV", "TSV", "Parquet", "line pairs", "saved dataset", "hub", "plug-in"
]
"""Forms in which rows are kept, by the names that people know them by."""

MAX_ROW_BYTES = 64 << 20
"""Longest row of text; a longer line is no row, or one that no model reads."""
COMPRESSED = (".gz", ".zst", ".zstd")
_GZIP, _ZSTD, _PARQUET = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"PAR1"
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "ZIP"}
_PEEK_BYTES = 1 << 16


def container_of(path: Path) -> Container:
    """Returns the container of an existing file. Raises StillhouseError(DATASET_INVALID) for compression that is not read."""
    suffix = plain_suffix(path)
    if suffix in (".source", ".target"):
        return "line pairs"
    with path.open("rb") as file:
        head = file.read(8)
    if path.suffix == ".parquet" or head.startswith(_PARQUET):
        return "Parquet"
    other = next((name for magic, name in _OTHERS.items() if head.startswith(magic)), None)
    if other:
        raise unreadable(path, "file of rows", f"it is compressed by {other}; gzip and zstd are read")
    if suffix in (".csv", ".tsv", ".tab"):
        return "CSV" if suffix == ".csv" else "TSV"
    with opened(path) as text:
        start = text.peek(_PEEK_BYTES)[:_PEEK_BYTES].removeprefix(b"\xef\xbb\xbf").lstrip()
    return "JSON array" if start.startswith(b"[") else "JSONL"


def plain_suffix(path: Path) -> str:
    """Returns the suffix of a file's name in lower case, that before .gz or .zst of a compressed file."""
    suffixes = [each.lower() for each in path.suffixes]
    while suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Opens a file for reading, and decompresses gzip and zstd by their first bytes.

    Raises StillhouseError(DATASET_INVALID) for damaged compression, also while it is read.
    """
    with path.open("rb") as file:
        head = file.read(4)
        file.seek(0)
        if head.startswith(_GZIP):
            what, stream = "gzip file", _gzip(file)
        elif head.startswith(_ZSTD):
            what, stream = "zstd file", _zstd(file)
        else:
            yield file
            return
        try:
            with stream:
                yield stream
        except (EOFError, OSError, gzip.BadGzipFile) as error:
            raise unreadable(path, what, error) from error


def _gzip(file: io.BufferedReader) -> io.BufferedReader:
    # GzipFile reads as a raw stream does, yet is typed as a buffered one.
    return io.BufferedReader(cast("Any", gzip.GzipFile(fileobj=file)), _PEEK_BYTES)


def _zstd(file: io.BufferedReader) -> io.BufferedReader:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), _PEEK_BYTES)


def bounded_lines(path: Path, file: io.BufferedReader) -> Iterator[tuple[int, bytes]]:
    """Yields number, from 1, and bytes of each line with its line break.

    Raises StillhouseError(DATASET_INVALID) for a line above MAX_ROW_BYTES.
    """
    lines = iter(lambda: file.readline(MAX_ROW_BYTES + 1), b"")
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_ROW_BYTES:
            raise row_error(
                path,
                number,
                THE_LINE,
                f"is longer than {MAX_ROW_BYTES} bytes. Shorten it, or write a row in each line.",
            )
        yield number, line


def closed(location: str, error: OSError) -> StillhouseError:
    """Returns the error of a dataset that the operating system does not open."""
    return StillhouseError(
        Reason.DATASET_INVALID,
        f"{location} cannot be opened: {error.strerror}. Correct the path, or who may read it.",
    )


def no_file(path: Path) -> StillhouseError:
    """Returns the error of a path at which something lies that is neither a file nor a folder."""
    try:
        mode = path.stat().st_mode
    except OSError:
        what = "a link that leads nowhere. Correct the link"
    else:
        kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
        what = f"a {kind}, and rows are read more than once. Give a file"
    return StillhouseError(Reason.DATASET_INVALID, f"{path} is {what}.")


def not_found(location: str) -> StillhouseError:
    """Returns the error of a dataset that is nowhere."""
    return StillhouseError(
        Reason.DATASET_NOT_FOUND,
        f"There is no dataset at {location}. Correct data.train or data.eval, or upload it with `stillhouse data push`.",
        resource=location,
    )
