"""Tables of prepared examples: written batch by batch, read through a memory map, so that their memory is the kernel's."""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.data.prepared.columns import (
    NAMED,
    SCHEMA,
    BatchView,
    Names,
    check_batch,
    examples_bytes,
    renamed,
)

BATCH_ROWS = 1 << 16
"""Rows of a batch at most; few batches make a table quick to open."""
BATCH_TOKENS = 1 << 22
"""Tokens, those of teachers' prompts among them, from which a batch is closed."""


class TableWriter:
    """Collects record batches of a table, in memory or in a file."""

    def __init__(self, file: BinaryIO | None = None) -> None:
        """Without `file` the table stays in memory."""
        self._writer = None if file is None else pa.ipc.new_file(file, SCHEMA)
        self._kept: list[pa.RecordBatch] = []
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_rows = self._waiting_tokens = 0
        self._hash = hashlib.blake2b(digest_size=16)
        self._names = {name: Names.of() for name in NAMED}

    @property
    def names(self) -> dict[str, list[str]]:
        """Names of the columns that hold places."""
        return {column: list(each.names) for column, each in self._names.items()}

    @property
    def digest(self) -> str:
        """Digest of the examples of a closed table, but for the places of their rows."""
        names = [self._names[column].names for column in NAMED if column != "path"]
        return hashlib.blake2b(self._hash.digest() + json.dumps(names).encode(), digest_size=16).hexdigest()

    def add(self, batch: pa.RecordBatch, names: Mapping[str, Sequence[str]]) -> None:
        """Appends the rows of a batch whose places are those of `names`."""
        for column, each in names.items():
            batch = renamed(batch, column, each, self._names[column])
        self._waiting.append(batch)
        self._waiting_rows += batch.num_rows
        self._waiting_tokens += sum(len(batch.column(name).values) for name in ("token_ids", "prompt_ids"))
        if self._waiting_rows >= BATCH_ROWS or self._waiting_tokens >= BATCH_TOKENS:
            self._flush()

    def close(self) -> list[pa.RecordBatch]:
        """Ends the table; returns its batches, none if they are in a file."""
        self._flush()
        if self._writer is not None:
            self._writer.close()
        return self._kept

    def _flush(self) -> None:
        if self._waiting_rows:
            table = pa.Table.from_batches(self._waiting, SCHEMA).combine_chunks()
            for batch in table.to_batches():
                for part in examples_bytes(batch):
                    self._hash.update(part)
                if self._writer is None:
                    self._kept.append(batch)
                else:
                    self._writer.write_batch(batch)
        self._waiting = []
        self._waiting_rows = self._waiting_tokens = 0


class PreparedTable:
    """The examples of one dataset, in order."""

    def __init__(
        self, batches: Sequence[pa.RecordBatch], names: dict[str, list[str]], owner: Any = None
    ) -> None:
        """`owner` is kept as long as this object: it holds the files."""
        self._owner = owner
        self._batches = [BatchView(batch) for batch in batches]
        self._ends = list(accumulate(each.num_rows for each in self._batches))
        self._names = names

    @classmethod
    def open(cls, path: Path, names: dict[str, list[str]], owner: Any = None) -> PreparedTable:
        """Maps the file at `path`. Raises OSError, ValueError or pyarrow.ArrowException for one that is none, or damaged.

        Token ids and masks are not read for that.
        """
        file = pa.ipc.open_file(pa.memory_map(str(path)))
        if file.schema != SCHEMA:
            raise pa.ArrowInvalid(f"{path} has other columns")
        batches = [file.get_batch(at) for at in range(file.num_record_batches)]
        for batch in batches:
            check_batch(batch, names)
        return cls(batches, names, owner)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def example(self, row: int) -> Example:
        """Makes the example of a row."""
        at = bisect.bisect_right(self._ends, row)
        return self._batches[at].example(row - (self._ends[at - 1] if at else 0), self._names)

    def lengths(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens of each of `rows`, ascending."""
        return self._gather(rows, lambda batch: batch.lengths)

    def largest(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Largest token id of each of `rows`, ascending."""
        return self._gather(rows, lambda batch: batch.largest)

    def of_teacher(self, rows: NDArray[np.int64], names: Sequence[str]) -> NDArray[np.bool_]:
        """True for those of `rows`, ascending, whose teacher is one of `names`."""
        wanted = [place for place, name in enumerate(self._names["teacher"]) if name in names]
        return np.isin(self._gather(rows, lambda batch: batch.teacher), wanted)

    def _gather(self, rows: NDArray[np.int64], column: Any) -> NDArray[np.int64]:
        found = np.empty(len(rows), np.int64)
        edges = np.searchsorted(rows, [0, *self._ends])
        for at, batch in enumerate(self._batches):
            begin, end = edges[at], edges[at + 1]
            if begin < end:
                found[begin:end] = column(batch)[rows[begin:end] - (self._ends[at - 1] if at else 0)]
        return found
