"""Threads for compiled code over the rows of a matrix, which take pieces of rows as they get free."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class RowThreads:
    """The calling thread and, once there is work for them, helpers; these end with this object."""

    def __init__(self, num_threads: int, *, rows_per_piece: int) -> None:
        self._num_threads = num_threads
        self._rows_per_piece = rows_per_piece
        self._helpers: ThreadPoolExecutor | None = None

    def run(self, num_rows: int, work: Callable[[slice], None]) -> None:
        """Calls `work`, which releases the interpreter's lock, with slices that cover the rows once. Raises the first error."""
        pieces = iter(range(0, num_rows, self._rows_per_piece))

        def take_pieces() -> None:
            for first in pieces:
                work(slice(first, min(first + self._rows_per_piece, num_rows)))

        num_helpers = min(self._num_threads, -(-num_rows // self._rows_per_piece)) - 1
        if num_helpers > 0 and self._helpers is None:
            self._helpers = ThreadPoolExecutor(self._num_threads - 1, "stillhouse-logits")
        helping = [self._helpers.submit(take_pieces) for _ in range(num_helpers)] if self._helpers else []
        take_pieces()
        for each in helping:
            each.result()
