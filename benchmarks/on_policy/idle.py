"""Share of time in which a rollout service has no text in its engine, from the counter on its metrics page.

The counter is exact: looks only find the span, from the first text of any service to the last, to which it is compared.
"""

from __future__ import annotations

import itertools
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

EVERY_S = 0.5
_BUSY = re.compile(rb"^stillhouse_engine_busy_seconds_total (\S+)$", re.MULTILINE)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class Look(NamedTuple):
    """A reading of the counter."""

    time_s: float
    busy_s: float


class IdleShare:
    """Looks at services; counts from the first time that one of them writes to the last."""

    def __init__(self) -> None:
        self._looks: dict[int, list[Look]] = {}

    @contextmanager
    def watch(self, ports: Sequence[int]) -> Iterator[None]:
        """Looks at the metrics pages at `ports` inside the block."""
        done = threading.Event()
        threads = [threading.Thread(target=self._look, args=(port, done), daemon=True) for port in ports]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            done.set()
            for thread in threads:
                thread.join()

    def shares(self) -> list[float]:
        """Idle share of each service; nothing where none has written."""
        return idle_shares(list(self._looks.values()))

    def _look(self, port: int, done: threading.Event) -> None:
        looks = self._looks.setdefault(port, [])
        while not done.wait(EVERY_S):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as page:
                    match = _BUSY.search(page.read())
            except OSError:
                continue
            if match is not None:
                looks.append(Look(time.monotonic(), float(match.group(1))))


def idle_shares(looks: Sequence[Sequence[Look]]) -> list[float]:
    """Idle share of each service from its looks, over the span in which any of them was busy; nothing if none was."""
    spans = [span for each in looks if (span := _busy_span(each)) is not None]
    if not spans:
        return []
    length_s = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return [1 - (each[-1].busy_s - each[0].busy_s) / length_s if each else 1.0 for each in looks]


def _busy_span(looks: Sequence[Look]) -> tuple[float, float] | None:
    """Times at which a service was first and last busy: between two looks it is so at the end at first, and at the beginning at last."""
    busy = [(before, after) for before, after in itertools.pairwise(looks) if after.busy_s > before.busy_s]
    if not busy:
        return None
    (first, second), (last, after) = busy[0], busy[-1]
    return second.time_s - (second.busy_s - first.busy_s), last.time_s + (after.busy_s - last.busy_s)
