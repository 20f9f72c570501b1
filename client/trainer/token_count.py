"""Counts the tokens of rows as a run would train on them, with the trainer's tokenizers."""

from __future__ import annotations

import json
from collections.abc import Iterator

from stillhouse.client.trainer.trainer import Trainer
from stillhouse.protos.rows.reading.row_error import row_error
from stillhouse.protos.rows.reading.source import RowReader, RowSource

REQUEST_ROWS = 4096
REQUEST_CHARS = 6 << 20
"""Size of the rows of one request; one row may be larger."""


def count_tokens(trainer: Trainer, source: RowSource, tokenizer: str) -> int:
    """Returns the tokens of all rows, prompts included, before any is cut, in tokenizer and chat template of a model.

    `tokenizer` is a path on the trainer's host or a hub id. Raises StillhouseError(DATASET_INVALID) for a row that the
    template refuses.
    """
    total = 0
    for rows in _requests(RowReader(source)):
        for row in trainer.inspect_rows({"student": {"model": tokenizer}}, rows).rows:
            if row.problem:
                raise row_error(source.location, row.number, row.field, row.problem)
            total += row.num_tokens
    return total


def _requests(rows: RowReader) -> Iterator[list[tuple[int, str]]]:
    found: list[tuple[int, str]] = []
    size = 0
    for number, values in rows:
        text = json.dumps(values, default=str)
        if found and (len(found) == REQUEST_ROWS or size + len(text) > REQUEST_CHARS):
            yield found
            found, size = [], 0
        found.append((number, text))
        size += len(text)
    if found:
        yield found
