"""Places where a test can have this process killed, as a power cut would, or put to sleep; without the variable they do nothing."""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "STILLHOUSE_FAILPOINT"
"""`name`, `name:n` for the n-th time that the place is reached, or `name:n:stop` to be stopped there and not killed."""

_reached: Counter[str] = Counter()


def reach(name: str) -> None:
    """Kill or stop this process if the environment asks for it here."""
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    _reached[name] += 1
    place, _, rest = wanted.partition(":")
    count, _, how = rest.partition(":")
    if place == name and _reached[name] == int(count or 1):
        os.kill(os.getpid(), signal.SIGSTOP if how == "stop" else signal.SIGKILL)
