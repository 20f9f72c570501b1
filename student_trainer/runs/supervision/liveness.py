"""Seconds since the last heartbeat of a training process, on the monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

LOOK_LIMIT_S = 1.0
"""Largest silence counted between two polls, so that a suspended service does not blame the process."""


class HeartbeatWatch:
    """Watches the heartbeat file of a process."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._looked_at_s = clock()
        self._seen_ns: int | None = None
        self._silent_s = 0.0

    def silent_s(self) -> float:
        """Seconds without a heartbeat, as this service observed them; poll often."""
        now_s = self._clock()
        heartbeat_ns = self._heartbeat_ns()
        if heartbeat_ns == self._seen_ns:
            self._silent_s += min(now_s - self._looked_at_s, LOOK_LIMIT_S)
        else:
            self._seen_ns, self._silent_s = heartbeat_ns, 0.0
        self._looked_at_s = now_s
        return self._silent_s

    def _heartbeat_ns(self) -> int | None:
        try:
            return self._path.stat().st_mtime_ns
        except OSError:
            return None
