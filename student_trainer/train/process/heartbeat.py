"""Heartbeats of a training process from its start to its end, also while it imports, loads and waits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import structlog

from stillhouse.student_trainer.run_dir import Attempt

log = structlog.get_logger()

HEARTBEAT_S = 5.0
"""Interval between two heartbeats."""


@contextlib.contextmanager
def heartbeats(attempt: Attempt) -> Iterator[None]:
    """Sends heartbeats from a thread of its own until the block ends; a stopped process sends none."""
    ended = threading.Event()

    def beat() -> None:
        while True:
            try:
                attempt.heartbeat()
            except OSError as error:  # a full disk ends the run where it writes something that matters
                log.warning("no heartbeat", why=str(error))
            if ended.wait(HEARTBEAT_S):
                return

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
