"""Filters of rows that share text with an evaluation set."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

from stillhouse.client.datasets.filters.row import Drop, FilterRow, ngrams
from stillhouse.client.datasets.row_files import no_rows, rows_of
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.reading.row_error import row_error


class Contamination:
    """Drops rows that have a run of `length` words in common with a row of the evaluation files.

    An evaluation text that is shorter counts as a whole. Memory holds about 70 bytes for each run of the evaluation files.
    """

    def __init__(self, files: list[Path], length: int) -> None:
        """Raises StillhouseError for a file without rows, or with one that has no text."""
        self._length = length
        self._runs: dict[int, tuple[bytes, int]] = {}
        self._lengths = {length}
        for file in files:
            count = 0
            for number, values in rows_of(file):
                count += 1
                try:
                    found = FilterRow(number, values).words
                except FieldError as error:
                    raise row_error(file, number, error.field, error.problem) from error
                if 0 < len(found) < length:
                    self._lengths.add(len(found))
                for run in ngrams(found, length):
                    self._runs.setdefault(_digest(run), (file.name.encode(), number))
            if not count:
                raise no_rows(file)

    def __call__(self, row: FilterRow) -> Drop | None:
        for run in self._runs_of(row):
            found = self._runs.get(_digest(run))
            if found is not None:
                shown = run if len(run) <= 80 else f"{run[:80]}…"
                return Drop(filter="contamination", why=f'row {found[1]} of {found[0].decode()}: "{shown}"')
        return None

    def _runs_of(self, row: FilterRow) -> Iterator[str]:
        """The runs of a row of every length that evaluation texts have."""
        for length in sorted(self._lengths):
            if len(row.words) >= length:
                yield from ngrams(row.words, length)


def _digest(run: str) -> int:
    return int.from_bytes(blake2b(run.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
