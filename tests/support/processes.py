"""Programs under test: every process that they start carries a mark in its environment, and none may outlive its test."""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = "STILLHOUSE_TEST_MARK"


@contextmanager
def no_process_left(patience_s: float = 10.0) -> Iterator[dict[str, str]]:
    """Gives the environment to start programs with; on leaving, fails if a process that carries it still lives.

    Leftovers are killed before it fails, so that one bad test does not slow the others.
    """
    mark = uuid.uuid4().hex
    yield {MARK: mark}
    deadline = time.monotonic() + patience_s
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        kill(pid)
    assert not left, f"processes outlived their test: {left}"


def marked_processes(mark: str) -> dict[int, str]:
    """Pid to command line of the live processes whose environment carries `mark`, whoever their parent is."""
    needle = f"{MARK}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if _state(entry) != "Z":
                    found[int(entry.name)] = command
        except OSError:
            continue  # it ended while it was looked at
    return found


def _state(entry: Path) -> str:
    return (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]


def kill(pid: int) -> None:
    """SIGKILL, if the process still lives."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
