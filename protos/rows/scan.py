"""Reads a dataset once, in bounded memory: counts, fields, refused rows, and a uniform sample for what costs more."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.reading.row_error import row_error
from stillhouse.protos.rows.reading.source import RowReader, RowSource
from stillhouse.protos.rows.training_row import parse_training_row

MAX_FIELDS = 200
"""Names of fields that are counted; data with values for names has no end of them."""
MAX_TOLD = 20
"""Refused rows that are told one by one; the others are counted."""
MAX_EXAMPLE_CHARS = 60
MAX_SAMPLE_BYTES = 6 << 20
"""Size of the sampled rows, as JSON."""
_TELL_EVERY_ROWS = 5000


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A row that can be trained on, as far as its fields tell."""

    number: int
    """Line of a text file, or row of a table, from 1."""
    values: Mapping[str, Any]

    def as_json(self) -> str:
        """Returns its fields as JSON text."""
        return json.dumps(self.values, default=str)


@dataclass(kw_only=True, slots=True)
class FieldUse:
    """Use of one field over all rows."""

    rows: int = 0
    """Rows in which it is not null."""
    kinds: Counter[str] = field(default_factory=Counter)
    """JSON types of its values."""
    example: str = ""
    """Start of its first value."""


@dataclass(kw_only=True, slots=True)
class Scan:
    """A dataset, read once."""

    source: RowSource
    container: str
    """JSONL, CSV, Parquet and so on."""
    form: str = ""
    """Form of the rows, such as messages; empty without any row that is read."""
    num_rows: int = 0
    num_refused: int = 0
    """Rows that no run takes, not counted in `num_rows`."""
    refused: list[StillhouseError] = field(default_factory=list)
    """The first MAX_TOLD of them."""
    is_complete: bool = True
    """False if rows follow that were not read."""
    fields: dict[str, FieldUse] = field(default_factory=dict)
    sample: list[tuple[int, str]] = field(default_factory=list)
    """Number and JSON text of rows drawn uniformly, by number."""
    rows: list[Row] = field(default_factory=list)
    """Those that were asked for."""

    @property
    def chosen(self) -> Row | None:
        """The first of them."""
        return self.rows[0] if self.rows else None


def scan(
    source: RowSource,
    *,
    sample_rows: int,
    first_row: int = 1,
    num_rows: int = 1,
    limit: int | None = None,
    on_rows: Callable[[int], None] = lambda _: None,
    **parsing: Any,
) -> Scan:
    """Reads a dataset, at most `limit` rows of it, and keeps `num_rows` that can be trained on from `first_row` on.

    The sample has at most `sample_rows` rows and MAX_SAMPLE_BYTES, or one row. `parsing` are options of
    `parse_training_row`, and `on_rows` is told the number of rows now and then. Raises StillhouseError for a source that
    cannot be read on.
    """
    found: Scan

    def refuse(error: StillhouseError) -> None:
        found.num_refused += 1
        if len(found.refused) < MAX_TOLD:
            found.refused.append(error)

    reader = RowReader(source, refuse=refuse)
    found = Scan(source=source, container=reader.container)
    reservoir = _Reservoir(sample_rows)
    rows = iter(reader)
    for number, values in islice(rows, limit):
        found.form = reader.form or ""
        if (found.num_rows + found.num_refused) % _TELL_EVERY_ROWS == 0:
            on_rows(found.num_rows)
        try:
            parse_training_row(values, **parsing)
        except FieldError as error:
            refuse(row_error(source.location, number, error.field, error.problem))
            continue
        found.num_rows += 1
        _count(values, found.fields)
        here = Row(number=number, values=values)
        if number >= first_row and len(found.rows) < num_rows:
            found.rows.append(here)
        reservoir.offer(here)
    if limit is not None and next(rows, None) is not None:
        found.is_complete = False
    found.sample = sorted(reservoir.rows)
    return found


class _Reservoir:
    """A uniform sample of rows (Vitter's algorithm R, 1985) of bounded size, the same each time."""

    def __init__(self, most_rows: int) -> None:
        self._most_rows = most_rows
        self._offered = 0
        self._size = 0
        self._random = random.Random(0)  # noqa: S311 - a sample, no secret
        self.rows: list[tuple[int, str]] = []

    def offer(self, row: Row) -> None:
        """Takes the row or leaves it; a sample that becomes too large has fewer rows from then on."""
        self._offered += 1
        at = self._random.randrange(self._offered) if self._offered > self._most_rows else len(self.rows)
        if at >= self._most_rows:
            return
        text = row.as_json()
        if at == len(self.rows):
            self.rows.append((row.number, text))
        else:
            self._size -= len(self.rows[at][1])
            self.rows[at] = row.number, text
        self._size += len(text)
        while self._size > MAX_SAMPLE_BYTES and len(self.rows) > 1:
            _, dropped = self.rows.pop(self._random.randrange(len(self.rows)))
            self._size -= len(dropped)
            self._most_rows = len(self.rows)


def _count(values: Mapping[str, Any], fields: dict[str, FieldUse]) -> None:
    for name, value in values.items():
        if value is None:
            continue
        use = fields.get(name)
        if use is None:
            if len(fields) >= MAX_FIELDS:
                continue
            use = fields[name] = FieldUse(example=_start(value))
        use.rows += 1
        use.kinds[_kind(value)] += 1


def _kind(value: object) -> str:
    match value:
        case bool():
            return "boolean"
        case str():
            return "text"
        case int() | float():
            return "number"
        case list() | tuple():
            return "list"
        case _:
            return "object"


def _start(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= MAX_EXAMPLE_CHARS else text[: MAX_EXAMPLE_CHARS - 1] + "…"
