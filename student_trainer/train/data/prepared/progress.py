"""Progress of the preparation of data: rows, rows a second and time left, told at intervals."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

import structlog

log = structlog.get_logger()

FIRST_S = 1.0
"""Time after which a preparation is told of; most are over by then."""
TOLD_S = 2.0
LOGGED_S = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Rows of one dataset so far."""

    path: str
    rows: int
    total: int | None
    """None: unknown before all are read."""
    seconds: float

    @property
    def rows_per_second(self) -> float:
        """Mean so far."""
        return self.rows / max(self.seconds, 1e-9)

    @property
    def left_s(self) -> float | None:
        """Time left at this rate; None without a total."""
        if not self.rows or self.total is None:
            return None
        return max(0, self.total - self.rows) / self.rows_per_second


class Observer(Protocol):
    """The receiver of a preparation's reports."""

    def check(self) -> None:
        """Called several times a second. May raise to end it."""
        ...

    def progress(self, progress: Progress | None) -> None:
        """Called every few seconds of a longer preparation, and with None at its end."""
        ...


class Unobserved:
    """An observer that does nothing."""

    def check(self) -> None:
        """Does nothing."""

    def progress(self, progress: Progress | None) -> None:
        """Does nothing."""


class ProgressReport:
    """Counts the rows of one dataset and reports them."""

    def __init__(self, path: str, total: int | None, observer: Observer) -> None:
        self._path, self._total, self._observer = path, total, observer
        self._began = time.monotonic()
        self._next_told = self._began + FIRST_S
        self._next_logged = self._began + FIRST_S
        self._is_told = False
        self.rows = 0

    def add(self, rows: int) -> None:
        """Counts rows that were encoded."""
        self.rows += rows
        now = time.monotonic()
        progress = Progress(path=self._path, rows=self.rows, total=self._total, seconds=now - self._began)
        if now >= self._next_told:
            self._next_told = now + TOLD_S
            self._is_told = True
            self._observer.progress(progress)
        if now >= self._next_logged:
            self._next_logged = now + LOGGED_S
            self._log("preparing data", progress)

    def close(self) -> None:
        """Tells that it is over."""
        if self._is_told:
            seconds = time.monotonic() - self._began
            self._observer.progress(None)
            self._log(
                "data prepared", Progress(path=self._path, rows=self.rows, total=self._total, seconds=seconds)
            )

    def _log(self, event: str, progress: Progress) -> None:
        left = {} if progress.left_s is None else {"left_s": round(progress.left_s)}
        total = {} if progress.total is None else {"of": progress.total}
        log.info(
            event,
            path=progress.path,
            rows=progress.rows,
            **total,
            rows_per_second=round(progress.rows_per_second),
            seconds=round(progress.seconds, 1),
            **left,
        )
