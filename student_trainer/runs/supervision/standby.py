"""A warm training process: it has imported what a run imports, waits, and takes the next run that fits it.

A process fits a run if its environment is the one that a new process would be started with: number of threads, devices and all that
libraries read when they are imported. Else, and where it does not take the run, it is ended, and the run gets a new process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import structlog

from stillhouse.student_trainer.config.settled.micro_batch import HALVE_VARIABLE
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.runs.data_dir import DataDir
from stillhouse.student_trainer.runs.supervision.training_process import (
    ChildProcess,
    open_log,
    standby_command,
    writes_below,
)
from stillhouse.student_trainer.standby_order import ADAPTER_VARIABLE, TAKEN, Order

FREE_BYTES = 4 * 2**30
"""Memory that must be free before a process waits, some fourteen times what it takes; it ends where half of that is free."""
TAKE_S = 5.0
"""Time for a standby process to take the run that it is given: an instant, or as long as an import keeps the interpreter."""
TAKE_OVER_S = 10.0
"""Time for a standby process whose service has died to end, or to open the log of the attempt that it was given."""
POLL_S = 0.02

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Expected:
    """The run that is expected next, as far as a process can prepare for it."""

    environ: Mapping[str, str]
    """Environment of its process."""
    adapter: bool
    """It trains an adapter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Waiting:
    """A process and the connection that is its standard input."""

    process: subprocess.Popen[bytes]
    line: socket.socket

    def take(self, order: Order, limit_s: float) -> bool:
        """Gives it the order; False if it has not taken the run by the limit."""
        self.line.settimeout(limit_s)
        try:
            self.line.sendall(order.line())
            return self.line.recv(len(TAKEN)) == TAKEN
        except OSError:  # it has died, or does nothing
            return False

    def end(self) -> None:
        if self.process.returncode is None:  # else its number may be another's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.line.close()
        self.process.wait()


class Standby:
    """At most one standby process. It ends with this service: nobody else holds the other end of its standard input."""

    def __init__(self, data_dir: Path, *, take_s: float = TAKE_S) -> None:
        self._data_dir = data_dir
        self._take_s = take_s
        self._lock = threading.Lock()
        self._waiting: _Waiting | None = None
        self._environ: dict[str, str] = {}
        self._failed: dict[str, str] | None = None
        """Environment in which the last one has died by itself: there is none with it before a run is started."""
        self._closed = False

    def keep(self, expected: Expected | None) -> None:
        """Sees to it that a process waits for a run like this; none waits for None. A failure is logged: runs start without."""
        with self._lock:
            if self._closed:
                return
            wanted = None if expected is None else _at_import(expected.environ)
            process = self._waiting.process if self._waiting is not None else None
            if process is not None and process.poll() is not None:
                log.warning("standby process has died", pid=process.pid, code=process.returncode)
                self._failed = self._environ
                self._end()
            if self._waiting is not None and wanted != self._environ:
                self._end()
            if expected and wanted and self._waiting is None and wanted != self._failed:
                self._start(wanted, adapter=expected.adapter)

    def take(self, run_dir: RunDir, attempt: int, environ: Mapping[str, str]) -> ChildProcess | None:
        """Makes the standby process the one of an attempt; None if there is none that fits `environ` and takes it.

        Raises OSError if the attempt's log cannot be created.
        """
        with self._lock:
            self._failed = None
            waiting = self._waiting
            if waiting is None:
                return None
            process = waiting.process
            if process.poll() is not None or _at_import(environ) != self._environ:
                log.info("standby process not used", pid=process.pid, code=process.returncode)
                self._end()
                return None
            open_log(run_dir, attempt).close()
            self._waiting = None
        order = Order(run_dir=run_dir.path, attempt=attempt, halve=environ.get(HALVE_VARIABLE) == "1")
        # Without the lock: `close` may be called on the service's loop.
        if not waiting.take(order, self._take_s):
            log.warning("standby process does not take the run", pid=process.pid, run=run_dir.path.name)
            waiting.end()
            return None
        waiting.line.close()
        return ChildProcess(process, waited=True)

    def cpu_s(self) -> float:
        """Processor seconds of the process that waits; 0 if none does."""
        with self._lock, contextlib.suppress(psutil.Error):
            if self._waiting is not None:
                times = psutil.Process(self._waiting.process.pid).cpu_times()
                return float(times.user + times.system)
        return 0.0

    def close(self) -> None:
        """Ends the process that waits; none is started afterwards."""
        with self._lock:
            self._closed = True
            self._end()

    def _start(self, environ: dict[str, str], *, adapter: bool) -> None:
        line, its_input = socket.socketpair()
        try:
            with its_input:
                process = subprocess.Popen(
                    standby_command(self._data_dir),
                    cwd=self._data_dir,
                    env=environ | {ADAPTER_VARIABLE: str(int(adapter))},
                    stdin=its_input.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
        except OSError as error:
            line.close()
            log.warning("no standby process", why=str(error))
            self._failed = environ
            return
        self._waiting = _Waiting(process=process, line=line)
        self._environ = environ
        log.info("standby process started", pid=process.pid)

    def _end(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.end()


def end_leftovers(data_dir: DataDir) -> None:
    """Waits until no standby process of an earlier service is left, and kills one that stays.

    One that had just been given a run becomes its training process meanwhile.
    """
    deadline = time.monotonic() + TAKE_OVER_S
    while waiting := _waiting(data_dir):
        if time.monotonic() > deadline:
            for process in waiting:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(waiting, timeout=TAKE_OVER_S)
            return
        time.sleep(POLL_S)


def _waiting(data_dir: DataDir) -> list[psutil.Process]:
    """Standby processes of other services without a run."""
    wanted, found = standby_command(data_dir.path)[1:], []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.cmdline()[1:] == wanted
                and process.ppid() != os.getpid()
                and process.status() != psutil.STATUS_ZOMBIE
                and not writes_below(process, data_dir.runs_path)
            ):
                found.append(process)
    return found


def _at_import(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that must be set before libraries are imported."""
    return {name: value for name, value in environ.items() if name != HALVE_VARIABLE}
