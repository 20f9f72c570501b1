"""Runs an arm's process to its end, or to a time limit, and reads peak memory and processor time of each process of its tree."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil

POLL_S = 0.25
GRACE_S = 30.0


def run_process(
    command: Sequence[object], *, log: Path, limit_s: float, environment: Mapping[str, str] | None = None
) -> tuple[int | None, float]:
    """Its exit code, None if it was stopped at its limit, and its seconds. No process of it is left."""
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(each) for each in command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return code, time.monotonic() - began


def halves_of_cores() -> tuple[list[int], list[int]]:
    """Cores of the student's host and of the services', where both are this machine. Raises ValueError for a single core."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise ValueError("One core cannot stand for two hosts; at least two are needed.")
    return cores[: len(cores) // 2], cores[len(cores) // 2 :]


@contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """Gives the programs that are started inside these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def tail(log: Path, num_lines: int = 3) -> str:
    """The end of a log."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return " | ".join(lines[-num_lines:])[-600:]


class _Use(NamedTuple):
    """Usage of a process so far."""

    name: str
    peak_mib: float
    cpu_s: float


class Watch:
    """The largest resident memory seen of each process below this one, and its processor time, by its command."""

    def __init__(self) -> None:
        self._used: dict[tuple[int, float], _Use] = {}
        self._looks: list[tuple[float, dict[tuple[int, float], float]]] = []
        """(Seconds since the epoch, processor seconds of each process until then)."""

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        """Looks several times a second, inside the block."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(POLL_S):
                self._look()

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            done.set()
            thread.join()

    def _look(self) -> None:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                key = (process.pid, process.create_time())
                before = self._used.get(key)
                mib, times = process.memory_info().rss / 2**20, process.cpu_times()
                self._used[key] = _Use(
                    _name(process.cmdline()),
                    max(mib, before.peak_mib if before else 0.0),
                    times.user + times.system,
                )
        self._looks.append((time.time(), {key: each.cpu_s for key, each in self._used.items()}))

    def peaks_mib(self, least_mib: float = 50.0) -> list[tuple[str, float]]:
        """(Name, MiB) of each process with at least so much, the largest first."""
        found = [(each.name, each.peak_mib) for each in self._used.values() if each.peak_mib >= least_mib]
        return sorted(found, key=lambda each: -each[1])

    def cpu_between(self, begin_s: float, end_s: float) -> list[tuple[str, float]]:
        """(Name, processor seconds) of each process between two times, by straight lines between looks, in the order of their start."""
        times = [time_s for time_s, _ in self._looks]
        found = []
        for key in sorted(self._used, key=lambda key: key[1]):
            used = [looked.get(key, 0.0) for _, looked in self._looks]
            began, ended = np.interp([begin_s, end_s], times, used) if times else (0.0, 0.0)
            found.append((self._used[key].name, float(ended - began)))
        return found

    def cpu_s(self, least_s: float = 1.0) -> list[tuple[str, float]]:
        """(Name, processor seconds) of each process with at least so many, the largest first; the last look may miss some."""
        found = [(each.name, each.cpu_s) for each in self._used.values() if each.cpu_s >= least_s]
        return sorted(found, key=lambda each: -each[1])


def _name(command: Sequence[str]) -> str:
    """The module of `python -m`, or the first word."""
    if "-m" in command[:-1]:
        return command[command.index("-m") + 1].removeprefix("stillhouse.")
    return command[0].rpartition("/")[2][:40] if command else "?"
