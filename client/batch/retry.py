"""Reads a finished output row by row: good rows are kept as they are while the failed ones are asked for again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Self

from stillhouse.client.batch.input_rows import InputLine, PromptRow
from stillhouse.client.batch.journal import Position, RowRecord
from stillhouse.client.batch.ordered_output import OutputPaths
from stillhouse.client.batch.output_formats import is_failed
from stillhouse.client.core.errors import file_errors, usage_error


class EarlierOutput:
    """The rows of a finished output, in the order of the input; a context manager."""

    def __init__(self, paths: OutputPaths, position: Position, *, is_dataset: bool) -> None:
        """`position` is the end of that output. Raises StillhouseError if it cannot be read."""
        self._path = paths.out
        self._left = position.rows
        self._is_dataset = is_dataset
        self.digest = f"{position.chain} {position.out_bytes} {position.num_failed}"
        """Tells one state of an output from another."""
        with file_errors("read", paths.out):
            self._failed = set(_failed_lines(paths.failed)) if is_dataset else set()
            self._out: BinaryIO = paths.out.open("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()

    def next(self, line: InputLine, row_of: Callable[[InputLine], PromptRow]) -> RowRecord | None:
        """Returns the output's lines for the next row of the input; None for one that failed or is missing."""
        if self._left == 0:
            return None
        self._left -= 1
        if not self._is_dataset:
            text = self._read()
            return None if is_failed(text) else RowRecord(digest=line.digest, out=text.decode())
        if line.line_number in self._failed:
            return None
        lines = [self._read().decode() for _ in range(row_of(line).num_completions)]
        return RowRecord(digest=line.digest, out="".join(lines))

    def _read(self) -> bytes:
        text = self._out.readline()
        if not text.endswith(b"\n"):
            raise usage_error(f"{self._path} has fewer rows than were written. Start again with --overwrite.")
        return text


def _failed_lines(path: Path) -> Iterator[int]:
    with path.open("rb") as file:
        for line in file:
            yield int(json.loads(line)["line"])
