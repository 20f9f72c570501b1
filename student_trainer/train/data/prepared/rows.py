"""Examples as sequences that read their rows when they are asked for, whole, sliced, or with rows left out."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import overload

import numpy as np
from numpy.typing import NDArray

from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.data.prepared.table import PreparedTable

AT_ONCE = 1 << 16
"""Rows whose lengths are looked at together."""


class ExampleRows(Sequence[Example]):
    """Examples of some tables behind one another."""

    def __init__(
        self,
        tables: Sequence[PreparedTable],
        *,
        without: NDArray[np.int64] | None = None,
        picked: NDArray[np.int64] | None = None,
        window: range | None = None,
    ) -> None:
        """All rows of `tables` but those of `without`, or those of `picked` alone; of these the ones in `window`.

        Both are places among the rows of all tables, ascending.
        """
        self._tables = tables
        self._ends = list(accumulate(len(each) for each in tables))
        total = self._ends[-1] if self._ends else 0
        self._without = np.zeros(0, np.int64) if without is None else without
        self._picked = picked
        # Rows before each one that is left out.
        self._before = self._without - np.arange(len(self._without))
        self._window = range(total - len(self._without) if picked is None else len(picked))
        if window is not None:
            self._window = window

    def __len__(self) -> int:
        return len(self._window)

    @overload
    def __getitem__(self, at: int) -> Example: ...

    @overload
    def __getitem__(self, at: slice) -> ExampleRows: ...

    def __getitem__(self, at: int | slice) -> Example | ExampleRows:
        if isinstance(at, slice):
            window = self._window[at]
            if window.step != 1:
                raise ValueError("rows are sliced without a step")
            return ExampleRows(self._tables, without=self._without, picked=self._picked, window=window)
        (row,) = self._rows(self._window[at], self._window[at] + 1)
        table = bisect.bisect_right(self._ends, row)
        return self._tables[table].example(int(row) - (self._ends[table - 1] if table else 0))

    def __iter__(self) -> Iterator[Example]:
        return (self[at] for at in range(len(self)))

    def longest(self) -> tuple[int, int]:
        """Place and length of the first example with the most tokens."""
        return self._first_max(PreparedTable.lengths)

    def largest(self) -> tuple[int, int]:
        """Place and token id of the first example with the largest id."""
        return self._first_max(PreparedTable.largest)

    def of_teachers(self, *names: str) -> ExampleRows:
        """The examples whose teacher is one of `names`."""
        kept = [
            rows[self._gather(rows, lambda table, part: table.of_teacher(part, names)).astype(np.bool_)]
            for rows in self._chunks()
        ]
        if sum(map(len, kept)) == len(self):
            return self
        return ExampleRows(self._tables, picked=np.concatenate([np.zeros(0, np.int64), *kept]))

    def _rows(self, begin: int, end: int) -> NDArray[np.int64]:
        """Returns the rows at [begin, end) of the sequence without a window, ascending."""
        if self._picked is not None:
            return self._picked[begin:end]
        places = np.arange(begin, end)
        if not len(self._without):
            return places
        return places + np.searchsorted(self._before, places, side="right")

    def _chunks(self) -> Iterator[NDArray[np.int64]]:
        stop = self._window.stop
        for begin in range(self._window.start, stop, AT_ONCE):
            yield self._rows(begin, min(begin + AT_ONCE, stop))

    def _first_max(
        self, column: Callable[[PreparedTable, NDArray[np.int64]], NDArray[np.int64]]
    ) -> tuple[int, int]:
        best, first = -1, 0
        for number, rows in enumerate(self._chunks()):
            values = self._gather(rows, column)
            at = int(np.argmax(values))
            if values[at] > best:
                best, first = int(values[at]), number * AT_ONCE + at
        return first, best

    def _gather(
        self,
        rows: NDArray[np.int64],
        column: Callable[[PreparedTable, NDArray[np.int64]], NDArray[np.generic]],
    ) -> NDArray[np.int64]:
        found = np.empty(len(rows), np.int64)
        edges = np.searchsorted(rows, [0, *self._ends])
        for at, table in enumerate(self._tables):
            begin, end = edges[at], edges[at + 1]
            if begin < end:
                found[begin:end] = column(table, rows[begin:end] - (self._ends[at - 1] if at else 0))
        return found
