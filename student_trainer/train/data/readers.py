"""Reads rows of text from JSONL, Parquet or saved Hugging Face datasets; errors name file, row and field.

JSONL is streamed; Parquet files and saved datasets are memory-mapped. No network.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import DatasetConfig

KINDS = (("messages",), ("prompt", "completion"), ("text",))
"""Field sets of a row, in order of precedence."""
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
        return StillhouseError(
            Reason.DATASET_INVALID,
            f"{self.path}, row {self.number}, field {field}: {problem}",
            metadata={"path": str(self.path), "row": str(self.number), "field": field},
        )

    def text(self, field: str) -> str:
        """Returns a string field. Raises StillhouseError(DATASET_INVALID)."""
        value = self.values.get(field)
        if not isinstance(value, str):
            raise self.invalid(field, f"is {_kind_of(value)}; it must be a string.")
        return value

    @property
    def kind(self) -> str:
        """Either "messages", "completion" or "text". Raises StillhouseError(DATASET_INVALID) for any other row."""
        present = {name for name, value in self.values.items() if value is not None}
        for fields in KINDS:
            if present.issuperset(fields):
                return fields[-1]
        if present & {"prompt", "completion"}:
            missing = "completion" if "prompt" in present else "prompt"
            raise self.invalid(missing, "is missing; a row with the one needs the other.")
        found = ", ".join(sorted(map(str, present))) or "nothing"
        raise self.invalid(
            "text", f"is missing: a row needs messages, or prompt and completion, or text; it has {found}."
        )


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
    elif _is_parquet(path):
        rows = _read_parquet(path)
    else:
        rows = _read_json_lines(path)
    return islice(rows, dataset.limit)


def _read_json_lines(path: Path) -> Iterator[DatasetRow]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            empty = DatasetRow(path=path, number=number, values={})
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise empty.invalid(
                    "(the line)", f"is not JSON ({error}); write one JSON object per line."
                ) from error
            if not isinstance(values, dict):
                raise empty.invalid("(the line)", f"is {_kind_of(values)}; it must be a JSON object.")
            yield DatasetRow(path=path, number=number, values=values)


def _read_parquet(path: Path) -> Iterator[DatasetRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield DatasetRow(path=path, number=number, values=values)
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, "Parquet", error) from error


def _read_saved(path: Path) -> Iterator[DatasetRow]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, "directory saved by Hugging Face datasets", error) from error
    if isinstance(loaded, datasets.DatasetDict):
        raise StillhouseError(
            Reason.DATASET_INVALID,
            f"{path} holds several splits ({', '.join(loaded)}); name one of them, such as {path / next(iter(loaded), 'train')}.",
        )
    for number, values in enumerate(loaded, start=1):
        yield DatasetRow(path=path, number=number, values=values)


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".parquet" or file.read(4) == b"PAR1"


def _unreadable(path: Path, what: str, error: Exception) -> StillhouseError:
    return StillhouseError(
        Reason.DATASET_INVALID,
        f"{path} cannot be read as a {what} ({error}). Write it again, or give a JSONL file.",
    )


def _kind_of(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
