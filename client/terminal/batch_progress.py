"""Shows a batch's progress: a bar with tokens per second on a terminal, and nothing elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stillhouse.client.batch.pipeline import BatchProgress
from stillhouse.client.terminal.render import printable

REFRESH_S = 0.1
"""Shortest time between two updates of the bar."""
WINDOW_S = 10.0
"""Window of the tokens per second."""


class BatchProgressBar:
    """The bar of a batch; `progress` is rich's, or None without a terminal."""

    def __init__(self, progress: Any, name: str) -> None:
        self._progress = progress
        self._next_s = 0.0
        self._last: BatchProgress | None = None
        self._tokens: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])
        if progress is not None:
            self._task = progress.add_task(printable(name), total=None, rows="", speed="")

    def show(self, now: BatchProgress) -> None:
        """Shows the batch's progress."""
        self._last = now
        if self._progress is not None and time.monotonic() >= self._next_s:
            self._update(now)

    def finish(self) -> None:
        """Shows the final progress."""
        if self._progress is not None and self._last is not None:
            self._update(self._last)

    def _update(self, now: BatchProgress) -> None:
        at_s = time.monotonic()
        self._next_s = at_s + REFRESH_S
        self._tokens.append((at_s, now.tokens))
        while len(self._tokens) > 2 and self._tokens[0][0] < at_s - WINDOW_S:
            self._tokens.popleft()
        begin_s, begin = self._tokens[0]
        failed = f", {now.failed} failed" if now.failed else ""
        self._progress.update(
            self._task,
            completed=now.rows,
            total=now.total_rows,
            rows=f"{now.rows}/{now.total_rows} rows{failed}",
            speed=f"{(now.tokens - begin) / max(at_s - begin_s, 1e-9):.0f} tokens/s",
        )

    def line(self, text: str) -> bool:
        """Shows one line above the bar; returns False without a bar."""
        if self._progress is None:
            return False
        self._progress.console.print(printable(text), markup=False, highlight=False)
        return True


@contextmanager
def progress_bar(name: str, *, visible: bool) -> Iterator[BatchProgressBar]:
    """The bar on standard error, if that is a terminal and `visible`."""
    if not (visible and sys.stderr.isatty()):
        yield BatchProgressBar(None, name)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rows]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        bar = BatchProgressBar(progress, name)
        try:
            yield bar
        finally:
            bar.finish()
