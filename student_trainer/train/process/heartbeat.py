"""Signs of life of a training process, from its start to its end, also while it imports, loads and waits."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import structlog

from stillhouse.student_trainer.run_dir import Attempt

log = structlog.get_logger()

HEARTBEAT_S = 5.0
"""Between two signs of life."""


@contextlib.contextmanager
def beating(attempt: Attempt) -> Iterator[None]:
    """Gives signs of life until the block ends, from a thread of its own: none come from a process that is stopped."""
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
