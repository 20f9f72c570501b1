"""Reads the rows of a run's datasets; errors name file, row and field."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rows.field_error import FieldError, kind_of, require_unicode
from stillhouse.protos.rows.reading.row_error import row_error
from stillhouse.protos.rows.reading.source import RowReader, RowSource
from stillhouse.protos.rows.training_row import TrainingRow, parse_training_row
from stillhouse.student_trainer.config.schema import DatasetConfig

_HELD_BY_SERVICE = re.compile(r"(datasets|caches|runs)/.+")


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetRow:
    """One row of a dataset file, not yet encoded."""

    path: Path
    number: int
    """Line of a JSONL file, else row of the table; counts from 1."""
    values: Mapping[str, Any]

    def invalid(self, field: str, problem: str) -> StillhouseError:
        """Returns the DATASET_INVALID error for `field` of this row; `problem` also says the remedy."""
        return row_error(self.path, self.number, field, problem)

    def text(self, field: str) -> str:
        """Returns a string field. Raises StillhouseError(DATASET_INVALID)."""
        value = self.values.get(field)
        if not isinstance(value, str):
            raise self.invalid(field, f"is {kind_of(value)}; it must be a string.")
        try:
            return require_unicode(value, field)
        except FieldError as error:
            raise self.invalid(error.field, error.problem) from error

    def parse(self, **options: Any) -> TrainingRow:
        """Returns the row's content; `options` are those of `parse_training_row`. Raises StillhouseError(DATASET_INVALID)."""
        try:
            return parse_training_row(self.values, **options)
        except FieldError as error:
            raise self.invalid(error.field, error.problem) from error


def resolve(path: str, data_dir: Path) -> Path:
    """Resolves a path of a run spec: names such as "datasets/..." are under the service's data directory."""
    return data_dir / path if _HELD_BY_SERVICE.fullmatch(path) else Path(path).expanduser()


def read_rows(dataset: DatasetConfig, data_dir: Path) -> Iterator[DatasetRow]:
    """Yields the rows of one dataset in file order, at most `dataset.limit`.

    Raises:
        StillhouseError: DATASET_NOT_FOUND, or DATASET_INVALID naming file and row.
    """
    rows = RowReader(source_of(dataset, data_dir))
    return islice(
        (DatasetRow(path=rows.path, number=number, values=values) for number, values in rows), dataset.limit
    )


def source_of(dataset: DatasetConfig, data_dir: Path) -> RowSource:
    """Returns the place and format of a dataset's rows."""
    is_held = _HELD_BY_SERVICE.fullmatch(dataset.path) is not None
    return RowSource(
        location=str(resolve(dataset.path, data_dir))
        if is_held or dataset.path.startswith("~")
        else dataset.path,
        format=dataset.format,
        split=dataset.split,
        config=dataset.config,
        columns=dataset.columns,
    )
