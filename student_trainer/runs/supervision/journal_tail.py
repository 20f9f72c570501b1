"""Ingests a run's journals into the store, and notifies watchers of the run."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Iterator

from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.runs.store.journal_ingest import read_batch
from stillhouse.student_trainer.runs.store.store import Store


class JournalTail:
    """Ingests the new journal lines of an attempt since the last call; blocks, for the database thread."""

    def __init__(self, store: Store, run_id: str, run_dir: RunDir, attempt: int) -> None:
        self._attempt = attempt
        self._store = store
        self._run_id = run_id
        self._run_dir = run_dir
        self._offsets: tuple[int, int] | None = None

    def ingest(self) -> bool:
        """Records new lines, each exactly once; True if there were any.

        Lines and offsets change in one transaction, so a killed service reads nothing twice.
        """
        if self._offsets is None:
            self._offsets = self._store.offsets(self._run_id)
        batch = read_batch(self._run_dir, self._offsets, self._attempt)
        following = (batch.offsets["events_offset"], batch.offsets["metrics_offset"])
        if following == self._offsets:
            return False
        self._offsets = None  # read again if recording fails, since the database may have committed
        self._store.record(self._run_id, batch)
        self._offsets = following
        return True


class ChangeNotifier:
    """Wakes tasks that wait for changes of a run."""

    def __init__(self) -> None:
        self._listeners: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self.closed = False
        """True once the service stops and waiting ends."""

    @contextlib.contextmanager
    def subscribe(self, run_id: str) -> Iterator[asyncio.Event]:
        """An event that is set on every change of the run."""
        event = asyncio.Event()
        self._listeners[run_id].add(event)
        try:
            yield event
        finally:
            self._listeners[run_id].discard(event)
            if not self._listeners[run_id]:
                del self._listeners[run_id]

    def notify(self, run_id: str) -> None:
        """Wakes the subscribers of a run."""
        for event in self._listeners.get(run_id, ()):
            event.set()

    def close(self) -> None:
        """Wakes all subscribers for the last time."""
        self.closed = True
        for run_id in list(self._listeners):
            self.notify(run_id)
