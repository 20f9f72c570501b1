"""Rows of one dataset, wherever they are and however they are written, in the fields that training and batches know."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.reading.delimited import read_delimited
from stillhouse.protos.rows.reading.json_rows import read_json_array, read_json_lines
from stillhouse.protos.rows.reading.line_pairs import escapes_mark, pair_of, read_pairs
from stillhouse.protos.rows.reading.open_file import (
    Container,
    closed,
    container_of,
    no_file,
    not_found,
    opened,
)
from stillhouse.protos.rows.reading.plugins import plugin_of, read_plugin
from stillhouse.protos.rows.reading.row_error import OnBadRow, raise_error, row_error
from stillhouse.protos.rows.reading.tables import is_hub_id, read_directory, read_hub, read_parquet
from stillhouse.protos.rows.row_forms import RowForm, RowForms

_WITH_SPLITS = ("plug-in", "saved dataset", "hub")
NumberedRow = tuple[int, dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSource:
    """Place and format of rows, as a dataset of a run file names them."""

    location: str
    """A path, `owner/name` on the hub, or `source:argument` of another package."""
    format: str = "auto"
    """Form of the rows; "auto" is that of the first one."""
    split: str = ""
    """Split of a dataset that has several."""
    config: str = ""
    """Configuration of a dataset of the hub."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field to the name that it has in the source."""


class RowReader:
    """Reads the rows of one source, in its order, each time that it is iterated over."""

    def __init__(self, source: RowSource, *, refuse: OnBadRow = raise_error) -> None:
        """`refuse` takes the error of each row that cannot be read; by default it is raised.

        Raises StillhouseError(DATASET_NOT_FOUND), or DATASET_INVALID for a file that is read in no way.
        """
        self.source = source
        self._refuse = refuse
        self._plugin = plugin_of(source.location)
        self.path = Path(source.location)
        try:
            self.container: Container = self._container()
            """Form in which the rows are kept."""
        except OSError as error:
            raise closed(source.location, error) from error
        if (source.split or source.config) and self.container not in _WITH_SPLITS:
            raise StillhouseError(
                Reason.DATASET_INVALID,
                f"{source.location} is read as {self.container}, which has neither splits nor configurations. Leave split and "
                "config out.",
            )
        self.form: RowForm | None = None
        """Form of the rows, once one was read."""

    def __iter__(self) -> Iterator[NumberedRow]:
        """Yields number and fields of each row; numbers are lines of text, or rows of a table, from 1.

        Raises StillhouseError(DATASET_INVALID) naming file and row.
        """
        forms = RowForms(self.source.format, self.source.columns)
        for number, values in self.raw():
            try:
                row = forms.canonical(values)
            except FieldError as error:
                self._refuse(row_error(self.source.location, number, error.field, error.problem))
                continue
            self.form = forms.form
            yield number, row

    def raw(self) -> Iterator[NumberedRow]:
        """Yields number and fields of each row as the source has them. Raises as iteration does."""
        source, path = self.source, self.path
        match self.container:
            case "plug-in":
                assert self._plugin is not None
                yield from read_plugin(
                    source.location, self._plugin, self._refuse, split=source.split, config=source.config
                )
            case "hub":
                yield from read_hub(source.location, split=source.split, config=source.config)
            case "saved dataset":
                yield from read_directory(path, split=source.split, config=source.config)
            case "Parquet":
                yield from read_parquet(path)
            case "line pairs":
                yield from read_pairs(path, self._refuse)
            case _:
                with opened(path) as file:
                    match self.container:
                        case "CSV":
                            yield from read_delimited(path, file, self._refuse, delimiter=",")
                        case "TSV":
                            yield from read_delimited(path, file, self._refuse, delimiter="\t")
                        case "JSON array":
                            yield from read_json_array(path, file, self._refuse)
                        case _:
                            yield from read_json_lines(path, file, self._refuse)

    def _container(self) -> Container:
        if self._plugin is not None:
            return "plug-in"
        if self.path.is_dir():
            return "saved dataset"
        if self.path.is_file():
            return container_of(self.path)
        if pair_of(self.path) is not None:
            return "line pairs"
        if os.path.lexists(self.path):
            raise no_file(self.path)
        if is_hub_id(self.source.location):
            return "hub"
        raise not_found(self.source.location)


def files_of(path: Path) -> list[Path]:
    """Returns the files that decide on the rows at a path: both of a pair and the mark of its escapes, else the path itself."""
    pair = None if path.is_dir() else pair_of(path)
    if pair is None or (path.is_file() and container_of(path) != "line pairs"):
        return [path]
    return [each for each in (*pair, escapes_mark(pair[0])) if each.is_file()]
