"""Programs under test: every process carries a mark of its test in its environment, and none may outlive it.

Rule: also a failing test, and one of which the fixtures fail, leaves no process behind.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARK = "STILLHOUSE_TEST_MARK"
TEST_MARK = "STILLHOUSE_TEST_ITEM"
"""Carried by what a test starts without `no_process_left`."""
SESSION_MARK = "STILLHOUSE_TEST_SESSION"
"""Carried by everything that a run of pytest starts, its workers included."""
# It starts with the first use of shared memory or a semaphore and serves the whole session.
LIVES_ON = "multiprocessing.resource_tracker"


@contextmanager
def no_process_left(patience_s: float = 10.0) -> Iterator[dict[str, str]]:
    """Gives the environment to start programs with; on leaving, fails if a process that carries it still lives.

    Leftovers are killed before it fails, so that one bad test does not slow the others; if the block fails, at once.
    """
    mark = uuid.uuid4().hex
    try:
        yield {MARK: mark, TEST_MARK: ""}
    except BaseException:
        end_marked(mark)
        raise
    left = end_marked(mark, patience_s=patience_s)
    assert not left, f"processes outlived their test: {left}"


@contextmanager
def watched_test(patience_s: float = 5.0) -> Iterator[None]:
    """Fails if a process that inherited this process's environment in the block outlives it; kills it in any case."""
    mark = uuid.uuid4().hex
    os.environ[TEST_MARK] = mark
    earlier = frozenset(Path("/proc").iterdir())
    try:
        yield
    finally:
        os.environ.pop(TEST_MARK, None)
        left = end_marked(mark, TEST_MARK, patience_s=patience_s, earlier=earlier)
    assert not left, f"processes outlived their test: {left}"


def begin_session() -> str:
    """Marks what this process starts from here on; an empty string if a run of pytest has started this one."""
    if SESSION_MARK in os.environ:
        return ""
    os.environ[SESSION_MARK] = uuid.uuid4().hex
    return os.environ[SESSION_MARK]


def inherit_interrupts() -> None:
    """Lets programs that this process starts be interrupted by Ctrl-C, even if this one was started to ignore it.

    A shell ignores SIGINT for jobs in the background, and an ignored signal stays ignored in all descendants; one that
    has a handler is reset to its default in them.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: None)


def end_marked(
    mark: str, variable: str = MARK, *, patience_s: float = 0.0, earlier: frozenset[Path] = frozenset()
) -> dict[int, str]:
    """Waits for the processes with this mark to end, kills the others, and returns these."""
    deadline = time.monotonic() + patience_s
    while (left := marked_processes(mark, variable, earlier)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        kill(pid)
    return left


def marked_processes(
    mark: str, variable: str = MARK, earlier: frozenset[Path] = frozenset()
) -> dict[int, str]:
    """Pid to command line of the live processes whose environment carries `mark`, whoever their parent is.

    Entries of /proc in `earlier` are not looked at: after each of some thousand tests that takes longer than many a test.
    """
    needle = f"{variable}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry in earlier or not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            if needle in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if _state(entry) != "Z" and LIVES_ON not in command:
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
