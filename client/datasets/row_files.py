"""Reads rows one by one and writes files whole: outputs appear together at the end, or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from stillhouse.client.core.errors import file_errors, usage_error
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import atomic_writer, sync_directory, sync_file
from stillhouse.protos.rows.files import read_file
from stillhouse.protos.rows.reading.json_rows import no_json
from stillhouse.protos.rows.reading.source import files_of

Values = Mapping[str, Any]


def rows_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number and fields of each row, as the file has them. Raises StillhouseError naming file and row."""
    with file_errors("read", path):
        yield from read_file(path).raw()


def no_rows(path: object) -> StillhouseError:
    """Returns the error of a file without rows."""
    return StillhouseError(Reason.DATASET_INVALID, f"{path} has no rows. Write some, or leave it out.")


def json_line(values: Values) -> bytes:
    """Returns a row as a line of JSON: characters as they are, half of a surrogate pair as its escape.

    Raises FieldError for a value of a table that JSON does not hold, such as a date.
    """
    try:
        return json.dumps(values, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(values).encode() + b"\n"
    except TypeError:
        raise no_json(values) from None


@contextmanager
def whole_files(
    outputs: Sequence[Path], *, inputs: Sequence[Path] = (), stale: Sequence[Path] = ()
) -> Iterator[list[BinaryIO]]:
    """Yields a file for each output; they replace their paths if the block ends, and else nothing is left.

    Of several, the old ones and those of `stale` are removed before the first new one has its name, and the first of
    `outputs` gets it last: files of two conversions never lie side by side, also after a kill. Folders are made. Raises
    StillhouseError for an output that is an input, or is given twice.
    """
    # Path.resolve raises for links that lead to each other.
    real = {path: os.path.realpath(path) for path in outputs}
    read = {os.path.realpath(each) for path in inputs for each in files_of(path)}
    for index, path in enumerate(outputs):
        if real[path] in read:
            raise usage_error(f"{path} is read and would be overwritten. Choose another output.")
        if real[path] in {real[each] for each in outputs[:index]}:
            raise usage_error(f"{path} is an output twice. Give each its own file.")
        if path.is_dir():
            raise usage_error(f"{path} is a folder. Name a file as output.")
    with ExitStack() as stack:
        files = []
        for path in outputs:
            stack.enter_context(file_errors("write", path))
            path.parent.mkdir(parents=True, exist_ok=True)
            files.append(stack.enter_context(atomic_writer(path)))
        yield files
        for file in files:
            sync_file(
                file
            )  # all of them before the first gets its name: a full disk leaves every path as it was
        old = [path for path in (*outputs, *stale) if path.is_file() or path.is_symlink()]
        if len(outputs) > 1 or set(old) - set(outputs):
            for path in old:
                path.unlink()
            for folder in {path.parent for path in old}:
                sync_directory(folder)


class RowSpool:
    """Lines in a temporary file, in any order again; memory holds 8 bytes a line. A context manager."""

    def __init__(self, folder: Path) -> None:
        """`folder` gets the file, which has no name."""
        with file_errors("write", folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by __exit__
        self._ends = array("Q", [0])

    def __enter__(self) -> RowSpool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._ends) - 1

    def add(self, line: bytes) -> None:
        """Appends a line."""
        self._file.write(line)
        self._ends.append(self._ends[-1] + len(line))

    def line(self, index: int) -> bytes:
        """Returns the line with an index, from 0."""
        begin = self._ends[index]
        self._file.seek(begin)
        return self._file.read(self._ends[index + 1] - begin)
