"""A small process beside vLLM's: when the teacher dies, also by SIGKILL, it ends what the teacher has started.

vLLM's engine process outlives a parent that could not say good-bye, and keeps its memory.
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
"""How often the guard looks for new processes of the teacher."""
_RELEASE = b"release"


class OrphanGuard:
    """The teacher's end of a guard."""

    def __init__(self) -> None:
        """Starts the guard of this process."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the teacher's group leaves the guard to do its work
        )

    def release(self) -> None:
        """Ends the guard, and nothing else."""
        with suppress(OSError):
            self._process.communicate(_RELEASE, timeout=10 * LOOK_INTERVAL_S)


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL to those that still live; a pid that belongs to another process by now is left alone."""
    for process in processes:
        with suppress(psutil.Error):
            process.kill()


def main() -> None:
    """Waits for the end of stdin, which is the end of the process with the given pid."""
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
