"""Filters of rows that share text with an evaluation set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from stillhouse.client.datasets.filters.row import Drop, FilterRow, words
from stillhouse.client.datasets.row_files import no_rows, rows_of
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.reading.row_error import row_error

MAX_SHOWN_CHARS = 80


class Contamination:
    """Drops rows that have a run of `length` words in common with a row of the evaluation files.

    A prompt that is shorter counts if a row has the same. The system's text, which many rows share, does not count. Memory holds
    about 0.1 KB for each word of the evaluation files.
    """

    def __init__(self, files: list[Path], length: int) -> None:
        """Raises StillhouseError for a file without rows, or with one that has no text."""
        self._length = length
        self._runs: dict[int, str] = {}
        self._prompts: dict[int, str] = {}
        for file in files:
            count = 0
            for number, values in rows_of(file):
                count += 1
                try:
                    self._add(FilterRow(number, values), f"row {number} of {file.name}")
                except FieldError as error:
                    raise row_error(file, number, error.field, error.problem) from error
            if not count:
                raise no_rows(file)

    def _add(self, row: FilterRow, place: str) -> None:
        for run in _runs(row.words, self._length):
            self._runs.setdefault(_digest(run), place)
        prompt = words(row.parts.prompt)
        if 0 < len(prompt) < self._length:
            self._prompts.setdefault(_digest(" ".join(prompt)), place)

    def __call__(self, row: FilterRow) -> Drop | None:
        prompt = " ".join(words(row.parts.prompt))
        shared = (
            (self._prompts.get(_digest(prompt)), prompt),
            *((self._runs.get(_digest(run)), run) for run in _runs(row.words, self._length)),
        )
        for place, text in shared:
            if place is not None:
                shown = text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}…"
                return Drop(filter="contamination", why=f'{place}: "{shown}"')
        return None


def _runs(parts: Sequence[str], length: int) -> Iterator[str]:
    """Yields the runs of `length` words; none for a shorter text."""
    for at in range(len(parts) - length + 1):
        yield " ".join(parts[at : at + length])


def _digest(run: str) -> int:
    return int.from_bytes(blake2b(run.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
