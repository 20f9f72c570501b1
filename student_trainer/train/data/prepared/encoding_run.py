"""Encodes the rows of datasets in order: here first, and by further processes once that takes longer.

The encoding of a row depends on the rows before it only through what they told of the chat template. A block that was
encoded before that was known is encoded again, so that the result is that of one process which reads row by row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any, Self

from stillhouse.student_trainer.train.data.chat.mask import Learned
from stillhouse.student_trainer.train.data.prepared.block import Block, BlockEncoder
from stillhouse.student_trainer.train.data.prepared.progress import Observer
from stillhouse.student_trainer.train.data.prepared.settings import ExampleSettings
from stillhouse.student_trainer.train.data.prepared.workers import BLOCKS_AHEAD, Workers
from stillhouse.student_trainer.train.data.readers import DatasetRow

BLOCK_ROWS = 256
START_AFTER_S = 1.0
"""Time that this process encodes alone: as long as others need to start."""
_POLL_S = 0.2


@dataclass(kw_only=True, slots=True)
class _Sent:
    """A block that a process encodes."""

    rows: list[DatasetRow]
    learned: Learned
    """Knowledge from the rows before it when it was sent."""
    block: Block | None = None
    is_done: bool = False


class EncodingRun:
    """Encodes datasets one after the other; a context manager that ends the processes it started."""

    def __init__(
        self,
        tokenizer: Any,
        settings: ExampleSettings,
        *,
        cores: int,
        observer: Observer,
        start_after_s: float = START_AFTER_S,
    ) -> None:
        """Raises StillhouseError(TOKENIZER_INVALID)."""
        self.encoder = BlockEncoder(tokenizer, settings)
        self._tokenizer = tokenizer
        self._settings = settings
        self._cores = cores
        self._observer = observer
        self._alone_s = start_after_s
        self._workers: Workers | None = None
        self.num_sent = 0
        """Blocks that other processes got."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._workers is not None:
            self._workers.__exit__(kind, error, trace)

    def blocks(self, rows: Iterator[DatasetRow], learned: Learned) -> Iterator[Block]:
        """Yields the blocks of `rows` in order; `learned` is what the rows before them told.

        Raises what `rows` raises, and StillhouseError(DATASET_INVALID), each behind the rows before it; what the
        observer raises at once.
        """
        taken = _Taken(rows)
        sent: deque[_Sent] = deque()
        by_number: dict[int, _Sent] = {}
        while True:
            self._observer.check()
            self._send(taken, sent, by_number, learned)
            if sent and not sent[0].is_done:
                assert self._workers is not None
                result = self._workers.result(_POLL_S)
                if result is not None:
                    done = by_number.pop(result[0])
                    done.block, done.is_done = result[1], True
                continue
            if sent:
                head = sent.popleft()
                block = head.block
                if block is None or head.learned != learned:
                    block = self.encoder.encode(head.rows, learned)
            else:
                own = taken.take()
                if not own:
                    return
                block = self._encode_here(own, learned)
            learned = block.learned
            yield block

    def _encode_here(self, rows: list[DatasetRow], learned: Learned) -> Block:
        began = time.monotonic()
        block = self.encoder.encode(rows, learned)
        self._alone_s -= time.monotonic() - began
        if self._alone_s <= 0 and self._workers is None and self._cores > 1:
            self._workers = Workers(self._tokenizer, self._settings, self._cores)
        return block

    def _send(self, taken: _Taken, sent: deque[_Sent], by_number: dict[int, _Sent], learned: Learned) -> None:
        """Gives processes what they take, within bounds."""
        if self._workers is None:
            return
        while len(sent) < 2 * BLOCKS_AHEAD * self._cores and self._workers.room:
            try:
                rows = taken.take()
            except Exception as error:
                taken.refuse(error)
                if not sent:
                    raise
                return
            if not rows:
                return
            each = _Sent(rows=rows, learned=learned)
            sent.append(each)
            self.num_sent += 1
            by_number[self.num_sent] = each
            self._workers.submit(self.num_sent, rows, learned)


class _Taken:
    """Takes blocks off an iterator of rows; an error of it comes behind the rows before it, and stays."""

    def __init__(self, rows: Iterator[DatasetRow]) -> None:
        self._rows = rows
        self._error: Exception | None = None

    def take(self) -> list[DatasetRow]:
        """The next rows; none at the end. Raises what the iterator raises."""
        if self._error is not None:
            raise self._error
        taken: list[DatasetRow] = []
        try:
            for row in islice(self._rows, BLOCK_ROWS):
                taken.append(row)
        except Exception as error:
            if not taken:
                raise
            self._error = error
        return taken

    def refuse(self, error: Exception) -> None:
        """Has `take` raise `error` from now on."""
        self._error = error
