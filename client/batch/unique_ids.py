"""Refuses a batch of which two rows have one id, before anything is generated: their results could not be told apart."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stillhouse.client.batch.input_rows import Format, parse_object, read_lines
from stillhouse.client.core.errors import usage_error
from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rows.field_error import shown


def check_ids(path: Path, row_format: Format) -> None:
    """Raises StillhouseError naming the lines of two rows with one id. Memory holds eight bytes for each row."""
    digests = np.array(array("Q", (_digest(each) for _, each, _ in _ids(path, row_format))), dtype=np.uint64)
    values, counts = np.unique(digests, return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return
    lines: dict[str, tuple[int, bool]] = {}
    for line, each, is_given in _ids(path, row_format):
        if _digest(each) not in suspects:
            continue
        key = json.dumps(each, sort_keys=True)
        if key in lines:
            first, was_given = lines[key]
            unnamed = "" if is_given and was_given else " (a row without an id has the number of its line)"
            raise usage_error(
                f"{path}: lines {first} and {line} have the same id, {shown(each)}{unnamed}. Give each row an id of its own, "
                "or leave id out of all."
            )
        lines[key] = line, is_given


def _ids(path: Path, row_format: Format) -> Iterator[tuple[int, Any, bool]]:
    """Yields line, id and True for an id that the row gives. Rows that cannot be read fail alone, later."""
    name = "id" if row_format == "plain" else "custom_id"
    mark = name.encode()
    for line in read_lines(path):
        values = {}
        if mark in line.data or b"\\" in line.data:
            try:
                values = parse_object(line)
            except StillhouseError:
                continue
        own = values.get(name)
        if own is not None:
            yield line.line_number, own, True
        elif row_format == "plain" and name not in values:
            yield line.line_number, line.line_number, False


def _digest(value: Any) -> int:
    text = json.dumps(value, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
