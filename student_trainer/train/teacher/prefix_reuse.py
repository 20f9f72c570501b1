"""Judges by its reports if a teacher's prefix cache holds texts between the queries about their parts."""

from __future__ import annotations

import threading
from collections import deque

import structlog

log = structlog.get_logger()

WINDOW = 64
"""Latest queries that are compared."""


class PrefixReuse:
    """Tokens that one teacher computed again, and those that were new to it, over the latest further parts of texts."""

    def __init__(self) -> None:
        self._latest: deque[tuple[int, int, int]] = deque(maxlen=WINDOW)
        self._lock = threading.Lock()
        self.pays = True
        """False once the cache held less than half of the beginnings, and these were more than what was new; it stays so, as whole
        texts tell nothing."""

    def add(self, *, num_scored: int, num_reused: int, num_new: int, target: str) -> None:
        """Counts a query about `num_new` tokens behind `num_scored` that earlier queries had, of which `num_reused` were held by the
        service at `target`."""
        with self._lock:
            self._latest.append((num_scored, max(0, num_scored - max(0, num_reused)), num_new))
            scored, again, new = (sum(each) for each in zip(*self._latest, strict=True))
            if not self.pays or len(self._latest) < WINDOW or again <= max(new, scored / 2):
                return
            self.pays = False
        log.warning(
            "the teacher's prefix cache does not hold texts between their parts: they are scored when they are whole; give the "
            "teacher more memory for its cache, or fewer clients",
            target=target,
            computed_again=again,
            new=new,
        )
