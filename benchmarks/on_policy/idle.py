"""Share of time in which a rollout service has nothing to write, from the gauge on its metrics page."""

from __future__ import annotations

import re
import socket
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

EVERY_S = 0.05
_RUNNING = re.compile(rb"^stillhouse_items_running (\S+)$", re.MULTILINE)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


class IdleShare:
    """Looks at services often; counts from the first time that one of them writes to the last."""

    def __init__(self) -> None:
        self._seen: dict[int, list[bool]] = {}

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
        """Idle share of each service that has written anything."""
        found = []
        for seen in self._seen.values():
            busy = [number for number, is_busy in enumerate(seen) if is_busy]
            if busy:
                window = seen[busy[0] : busy[-1] + 1]
                found.append(1 - sum(window) / len(window))
        return found

    def _look(self, port: int, done: threading.Event) -> None:
        seen = self._seen.setdefault(port, [])
        while not done.wait(EVERY_S):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=2) as page:
                    match = _RUNNING.search(page.read())
            except OSError:
                continue
            if match is not None:
                seen.append(float(match.group(1)) > 0)
