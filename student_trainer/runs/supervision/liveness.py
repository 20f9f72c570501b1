"""How long a training process has given no sign of life, on no clock that anybody can set."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

LOOK_LIMIT_S = 1.0
"""The most that counts between two looks: a service that was itself stopped does not blame the process."""


class HeartbeatWatch:
    """Watches the file that a process touches while it lives."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._looked_at_s = clock()
        self._seen_ns: int | None = None
        self._silent_s = 0.0

    def silent_s(self) -> float:
        """Seconds without a sign of life so far, as this service saw them; look often."""
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
