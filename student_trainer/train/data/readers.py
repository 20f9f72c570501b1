"""Reads rows of text from JSONL, Parquet or saved Hugging Face datasets, without a network; errors name file, row and field."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.library_errors import reported_as
from stillhouse.protos.rows.field_error import FieldError, kind_of, require_unicode
from stillhouse.protos.rows.files import read_file, row_error, unicode_rows, unreadable, without_nulls
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
    path = resolve(dataset.path, data_dir)
    if path.is_dir():
        rows = _read_saved(path)
    elif not path.is_file():
        raise StillhouseError(
            Reason.DATASET_NOT_FOUND,
            f"There is no dataset at {path}. Correct data.train or data.eval, or upload it with `stillhouse data push`.",
            resource=str(path),
        )
    else:
        rows = (DatasetRow(path=path, number=number, values=values) for number, values in read_file(path))
    return islice(rows, dataset.limit)


def _read_saved(path: Path) -> Iterator[DatasetRow]:
    import datasets

    def refused(error: BaseException) -> StillhouseError:
        return unreadable(path, "directory saved by Hugging Face datasets", error)

    with reported_as(refused):
        loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        raise StillhouseError(
            Reason.DATASET_INVALID,
            f"{path} holds several splits ({', '.join(loaded)}); name one of them, such as {path / next(iter(loaded), 'train')}.",
        )
    for number in range(1, len(loaded) + 1):
        with reported_as(refused), unicode_rows(path, number):
            values = loaded[number - 1]
        yield DatasetRow(path=path, number=number, values=without_nulls(values))
