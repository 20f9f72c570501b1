"""Failpoints: named lines where a test can have this process killed, as by a power cut, or stopped; inactive by default."""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "STILLHOUSE_FAILPOINT"
"""`name`, `name:n` for the n-th time that it is reached, or `name:n:stop` to send SIGSTOP instead of SIGKILL."""

_reached: Counter[str] = Counter()


def reach(name: str) -> None:
    """Kills or stops this process if STILLHOUSE_FAILPOINT names this failpoint."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    _reached[name] += 1
    failpoint, _, rest = wanted.partition(":")
    count, _, how = rest.partition(":")
    if failpoint == name and _reached[name] == int(count or 1):
        os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
