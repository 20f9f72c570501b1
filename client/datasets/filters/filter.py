"""Filters a file of rows: the rows that stay, those that were dropped and why, and counts of both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stillhouse.client.core.errors import usage_error
from stillhouse.client.datasets.filters.row import Drop, Filter, FilterRow
from stillhouse.client.datasets.row_files import json_line, no_rows, rows_of, whole_files
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.reading.row_error import row_error

DROPPED = "dropped"
"""Field of a dropped row that says why."""


@dataclass(kw_only=True, slots=True)
class FilterSummary:
    """Counts of a filtered file."""

    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows dropped by each filter; a row counts for the first that drops it."""


def filter_file(
    source: Path, out: Path, filters: Sequence[Filter], *, dropped: Path | None = None
) -> FilterSummary:
    """Writes the rows of `source` that every filter keeps to `out`, the others with their reason to `dropped`.

    Raises StillhouseError for a row that lacks what a filter looks at; then nothing is written.
    """
    if not filters:
        raise usage_error("no filter is given. Give at least one.")
    summary = FilterSummary()
    outputs = [out] if dropped is None else [out, dropped]
    with whole_files(outputs, inputs=[source]) as files:
        for number, values in rows_of(source):
            row = FilterRow(number, values)
            summary.rows += 1
            try:
                drop = _first_drop(filters, row)
                if drop is None:
                    summary.kept += 1
                    files[0].write(json_line(values))
                    continue
                summary.dropped[drop.filter] += 1
                if dropped is not None:
                    reason = {"filter": drop.filter, "why": drop.why, "row": number}
                    files[1].write(json_line({**values, DROPPED: reason}))
            except FieldError as error:
                raise row_error(source, number, error.field, error.problem) from error
        if not summary.rows:
            raise no_rows(source)
    return summary


def _first_drop(filters: Sequence[Filter], row: FilterRow) -> Drop | None:
    """Returns the reason of the first filter that drops a row. Raises FieldError."""
    if row.values.get("completions") is not None:
        raise FieldError(
            "completions", "are samples of a batch; `stillhouse data parse` makes a row of each."
        )
    return next((found for each in filters if (found := each(row)) is not None), None)
