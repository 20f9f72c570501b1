"""Converts a file of rows to another format, and back to the rows that it was made of."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from stillhouse.client.core.errors import usage_error
from stillhouse.client.datasets.conversion.companion import companion_of, companion_row, with_companion
from stillhouse.client.datasets.conversion.forms import to_messages, to_openai
from stillhouse.client.datasets.conversion.line_pairs import (
    SOURCE,
    TARGET,
    pair_stem,
    read_pairs,
    write_pairs,
)
from stillhouse.client.datasets.conversion.parquet import restored, write_parquet
from stillhouse.client.datasets.row_files import RowSpool, json_line, no_rows, rows_of, whole_files
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.reading.line_pairs import ESCAPED
from stillhouse.protos.rows.reading.row_error import row_error

Target = Literal["source-target", "messages", "openai", "parquet", "rows"]
TARGETS: tuple[Target, ...] = ("source-target", "messages", "openai", "parquet", "rows")
Rows = Iterator[tuple[int, dict[str, Any]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """The files that were written."""

    rows: int
    outputs: tuple[Path, ...]
    note: str = ""
    """A sentence for people; empty if there is nothing to say."""


def convert(
    source: Path, out: Path, to: Target, *, chat: bool = False, legacy_newlines: bool = False
) -> Conversion:
    """Converts the rows of `source`, which is read as what it is.

    What a conversion has put beside its output is taken up again, so that "rows" gives back the rows that there were. `chat`
    makes turns of prompts and completions of text, for "messages" and "openai". Raises StillhouseError naming the row; then
    nothing is written.
    """
    if not out.name:
        raise usage_error(f"{out} is a folder. Name a file as output.")
    if legacy_newlines and to != "source-target":
        raise usage_error("line breaks of old are those of source-target. Leave --legacy-newlines out.")
    if chat and to not in ("messages", "openai"):
        raise usage_error(f"turns are made for messages and openai, not for {to}. Leave --chat out.")
    if to == "source-target":
        count, outputs = write_pairs(
            partial(original_rows, source), source, out, legacy_newlines=legacy_newlines
        )
        return Conversion(rows=count, outputs=tuple(outputs))
    if to == "parquet":
        return _to_parquet(source, out)
    if to == "openai":
        return _to_openai(source, out, chat=chat)
    count = 0
    with whole_files([out], inputs=[source], stale=[companion_of(out)]) as (file,):
        for number, values in original_rows(source):
            try:
                file.write(json_line(to_messages(values, chat=chat) if to == "messages" else values))
            except FieldError as error:
                raise row_error(source, number, error.field, error.problem) from error
            count += 1
        if not count:
            raise no_rows(source)
    return Conversion(rows=count, outputs=(out,))


def original_rows(source: Path) -> Rows:
    """Yields number and fields of each row that a file was made of, in their order."""
    if source.is_dir():
        yield from rows_of(source)
        return
    stem = pair_stem(source)
    pair = stem.with_name(stem.name + SOURCE)
    is_pair = source.suffix in (SOURCE, TARGET) or (pair.is_file() and not source.is_file())
    if is_pair and companion_of(pair).is_file() and stem.with_name(stem.name + ESCAPED).is_file():
        yield from _in_order(source)
        return
    if not is_pair and companion_of(source).is_file():
        for number, values, others in with_companion(source, rows_of(source)):
            yield number, {**values, **others}
        return
    for number, values in rows_of(source):
        try:
            yield number, restored(values)
        except (ValueError, RecursionError) as error:
            raise row_error(
                source, number, "row_json", f"is not what a conversion writes: {error}."
            ) from error


def _in_order(source: Path) -> Rows:
    """Yields the rows of a pair in the order that they had before they were sorted."""
    with RowSpool(source.parent) as spool:
        places: dict[int, int] = {}
        for index, values in enumerate(read_pairs(source)):
            place = values.pop("row")
            if type(place) is not int or place in places:
                raise row_error(
                    source, index + 1, "row", "is not what a conversion writes. Convert the rows again."
                )
            places[place] = index
            spool.add(json_line(values))
        for number, place in enumerate(sorted(places), start=1):
            yield number, json.loads(spool.line(places[place]))


def _to_openai(source: Path, out: Path, *, chat: bool) -> Conversion:
    companion = companion_of(out)
    count, has_others = 0, False
    with whole_files([out, companion], inputs=[source]) as (file, beside):
        for number, values in original_rows(source):
            try:
                row, others = to_openai(values, chat=chat)
                beside_row = companion_row(others, row)
                file.write(json_line(row))
                beside.write(json_line(beside_row))
            except FieldError as error:
                raise row_error(source, number, error.field, error.problem) from error
            count, has_others = count + 1, has_others or bool(others)
        if not count:
            raise no_rows(source)
    if not has_others:
        companion.unlink(missing_ok=True)
        return Conversion(rows=count, outputs=(out,))
    return Conversion(
        rows=count,
        outputs=(out, companion),
        note=f"Fields without a place in OpenAI's format are in {companion.name}.",
    )


def _to_parquet(source: Path, out: Path) -> Conversion:
    count = 0

    def rows() -> Rows:
        nonlocal count
        count = 0
        for number, values in original_rows(source):
            count += 1
            yield number, values

    with whole_files([out], inputs=[source], stale=[companion_of(out)]) as (file,):
        num_as_json = write_parquet(source, rows, file)
        if not count:
            raise no_rows(source)
    note = (
        f"{num_as_json} rows are in the column row_json, since columns do not hold them exactly."
        if num_as_json
        else ""
    )
    return Conversion(rows=count, outputs=(out,), note=note)
