"""Guard process that ends a teacher's processes when the teacher dies, also by SIGKILL.

vLLM's engine process outlives a killed parent, and keeps its memory.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress

import psutil

LOOK_INTERVAL_S = 0.5
"""Interval at which the guard lists the teacher's processes."""
_RELEASE = b"release"


class OrphanGuard:
    """Handle of the guard process."""

    def __init__(self) -> None:
        """Starts a guard for this process."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the teacher's group does not reach the guard
        )

    def release(self) -> None:
        """Ends the guard alone."""
        with suppress(OSError):
            self._process.communicate(_RELEASE, timeout=10 * LOOK_INTERVAL_S)


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """Sends SIGKILL to those still alive; a reused pid is left alone."""
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def main() -> None:
    """Waits for the end of stdin, which is the end of the teacher with the given pid."""
    teacher = psutil.Process(int(sys.argv[1]))
    known: set[psutil.Process] = set()
    while True:
        with suppress(psutil.Error):
            known.update(each for each in teacher.children(recursive=True) if each.pid != os.getpid())
        readable, _, _ = select.select([sys.stdin], [], [], LOOK_INTERVAL_S)
        if readable:
            break
        known = {each for each in known if each.is_running()}
    if os.read(sys.stdin.fileno(), len(_RELEASE)) != _RELEASE:
        kill_all(known)


if __name__ == "__main__":
    main()
