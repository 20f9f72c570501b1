"""Reads Parquet, directories that Hugging Face datasets saved, and datasets of the hub: rows of typed columns."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError, first_line
from stillhouse.protos.library_errors import reported_as
from stillhouse.protos.rows.reading.row_error import unicode_rows, unreadable
from stillhouse.protos.rows.reading.strict_json import shown_name

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
"""Names of the hub that rows are read from; those without an owner look like files."""
_FILE_SUFFIXES = (
    ".jsonl",
    ".json",
    ".csv",
    ".tsv",
    ".tab",
    ".parquet",
    ".txt",
    ".gz",
    ".zst",
    ".source",
    ".target",
)
_BATCH_ROWS = 1024
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")


def is_hub_id(location: str) -> bool:
    """Returns True for a name that may be a dataset's on the hub; one that ends as a file's does is a path."""
    return HUB_ID.fullmatch(location) is not None and not location.lower().endswith(_FILE_SUFFIXES)


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields number, from 1, and fields of each row."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            names = file.schema_arrow.names
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise StillhouseError(
                    Reason.DATASET_INVALID,
                    f"{path} has the column {shown_name(twice)} twice, so that one of them would be lost. Give each a name "
                    "of its own.",
                )
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for index in range(batch.num_rows):
                    number += 1
                    with unicode_rows(path, number):
                        (values,) = batch.slice(index, 1).to_pylist()
                    yield number, without_nulls(values)
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(path, "Parquet file", error) from error


def read_directory(path: Path, *, split: str, config: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of a directory that `save_to_disk` wrote, or of one in the layout of the hub."""
    datasets = _library(str(path))

    def refused(error: BaseException) -> StillhouseError:
        return unreadable(path, "directory saved by Hugging Face datasets", error)

    with reported_as(refused):
        if any((path / name).is_file() for name in _SAVED):
            loaded = datasets.load_from_disk(str(path))
        else:
            loaded = datasets.load_dataset(str(path), name=config or None, split=split or None)
            split = split if isinstance(loaded, Mapping) else ""
    yield from _numbered(str(path), _one_split(str(path), loaded, split), refused)


def read_hub(name: str, *, split: str, config: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the rows of a dataset of the hub, by HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and the library's cache."""
    datasets = _library(name)

    def refused(error: BaseException) -> StillhouseError:
        offline = " HF_HUB_OFFLINE keeps it from looking further." if os.environ.get("HF_HUB_OFFLINE") else ""
        said = first_line(error).rstrip(".")
        asked = ", ".join(filter(None, [config and f"config {config}", split and f"split {split}"]))
        return StillhouseError(
            Reason.DATASET_NOT_FOUND,
            f"{name}{f' ({asked})' if asked else ''} is neither a path nor a dataset that Hugging Face gives here "
            f"({type(error).__name__}: {said}).{offline} Correct path, config and split, or give a directory.",
            resource=name,
        )

    with reported_as(refused):
        loaded = datasets.load_dataset(name, name=config or None, split=split or None)
    yield from _numbered(name, _one_split(name, loaded, ""), refused)


def _library(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise StillhouseError(
            Reason.DATASET_INVALID,
            f"{name} needs the library datasets, which is not installed here; `pip install datasets`, or give a file.",
        ) from error
    return datasets


def _one_split(name: str, loaded: Any, split: str) -> Any:
    """Returns the split that is asked for, or the only one. Raises StillhouseError(DATASET_INVALID)."""
    if not isinstance(loaded, Mapping):
        if split and split != str(loaded.split):
            raise StillhouseError(
                Reason.DATASET_INVALID, f"{name} holds the split {loaded.split}, not {split}; correct split."
            )
        return loaded
    if not split and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split in loaded:
        return loaded[split]
    problem = f"has no split {split}" if split else "holds several splits"
    raise StillhouseError(
        Reason.DATASET_INVALID,
        f"{name} {problem}; name one of {', '.join(loaded)} with split, as in `split: {next(iter(loaded), 'train')}`.",
    )


def _numbered(name: str, table: Any, refused: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for number in range(1, len(table) + 1):
        with reported_as(refused), unicode_rows(name, number):
            values = table[number - 1]
        yield number, without_nulls(values)


def without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a table's row without the nulls that its columns force on messages, calls and tools that lack a field."""
    return {name: _dense(value) for name, value in values.items()}


def _dense(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _dense(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_dense(each) for each in value]
    return value
