"""Training processes: started in their own process group, or adopted after a restart."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import psutil

from stillhouse.protos.child_process import python_path
from stillhouse.student_trainer import standby_order
from stillhouse.student_trainer.config.settled.micro_batch import HALVE_VARIABLE
from stillhouse.student_trainer.run_dir import ProcessRecord, RunDir, start_time_of

CREDENTIALS_VARIABLE = "STILLHOUSE_CREDENTIALS"
"""Environment variable with the path of the teachers' credentials file."""
SECRETS = frozenset({"STILLHOUSE_TRAINER_DATABASE", "PGPASSWORD"})
"""Environment variables of the service that its processes do not get."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exit:
    """Exit status of a process; `code` is None if it is unknown."""

    code: int | None
    signal: int = 0


class Process(Protocol):
    """A training process of a run."""

    def poll(self) -> Exit | None:
        """Exit status; None while it lives."""
        ...

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to its process group."""
        ...


class ChildProcess:
    """A process that this service started."""

    def __init__(self, process: subprocess.Popen[bytes], *, waited: bool = False) -> None:
        self._process = process
        self.waited = waited
        """True if it was a standby process."""

    @property
    def pid(self) -> int:
        """Its process id, which is that of its group too."""
        return self._process.pid

    def poll(self) -> Exit | None:
        """Exit status; the rest of its process group is killed before the pid can be reused."""
        if self._process.returncode is None:
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            if os.waitid(os.P_PID, self._process.pid, flags) is None:
                return None
            self.send(signal.SIGKILL)
        code = self._process.wait()
        return Exit(code=code) if code >= 0 else Exit(code=128 - code, signal=-code)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def end(self) -> None:
        """Kills its process group and waits for its end."""
        self.send(signal.SIGKILL)
        self._process.wait()


class AdoptedProcess:
    """A process started by an earlier service; its record is None if it exited meanwhile."""

    def __init__(self, record: ProcessRecord | None) -> None:
        self._record = record

    def poll(self) -> Exit | None:
        """Exit with unknown status once it has ended, since only its parent could read it."""
        return None if self._record is not None and self._record.alive else Exit(code=None)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to its process group."""
        if self._record is not None and self._record.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._record.pid, number)


def command(run_dir: RunDir, attempt: int) -> list[str]:
    """The training process's argument list."""
    # -P keeps the working directory off the import path.
    module = [sys.executable, "-P", "-m", "stillhouse.student_trainer.train"]
    return [*module, str(run_dir.path), "--attempt", str(attempt)]


def standby_command(data_dir: Path) -> list[str]:
    """The argument list of a standby process of the service with this data directory."""
    return [sys.executable, "-P", "-m", standby_order.MODULE, str(data_dir)]


def start(run_dir: RunDir, attempt: int, environ: Mapping[str, str]) -> ChildProcess:
    """Starts the training process in an `environment`; its output goes to the attempt's log.

    Raises:
        OSError: the process or its log cannot be created.
    """
    with open_log(run_dir, attempt) as log:
        process = subprocess.Popen(
            command(run_dir, attempt),
            cwd=run_dir.path,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return ChildProcess(process)


def open_log(run_dir: RunDir, attempt: int) -> BinaryIO:
    """Opens the log of an attempt, which is made if missing. Raises OSError."""
    log_path = run_dir.log_path(attempt)
    log_path.parent.mkdir(parents=True, exist_ok=True)
    return log_path.open("ab")


def environment(
    *, devices: Sequence[int], threads: int, credentials: Path, halve: bool = False
) -> dict[str, str]:
    """The service's environment with the process's devices and threads; it trains with half its micro-batch if `halve`."""
    return environment_of_child() | {
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, devices)),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        CREDENTIALS_VARIABLE: str(credentials),
        HALVE_VARIABLE: str(int(halve)),
    }


def environment_of_child() -> dict[str, str]:
    """The service's environment for a Python process of its own: without secrets, with the package on the path."""
    variables = {name: value for name, value in os.environ.items() if name not in SECRETS}
    return variables | {"PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"}


def find_running(data_dir: Path, run_dir: RunDir, attempt: int) -> ProcessRecord | None:
    """The live process of an attempt that an earlier service started.

    Found by the run's lock and record, or before those exist by its arguments, or as a standby process that writes the
    attempt's log.
    """
    record = run_dir.locked_by_live_process()
    if record is not None:
        return record if record.attempt == attempt else None
    wanted, standby = command(run_dir, attempt)[1:], standby_command(data_dir)[1:]
    log_path = run_dir.log_path(attempt)
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            arguments = process.cmdline()[1:]
            if arguments == wanted or (arguments == standby and writes_below(process, log_path)):
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                return ProcessRecord(attempt=attempt, pid=process.pid, start_time=start_time_of(process.pid))
    return None


def writes_below(process: psutil.Process, path: Path) -> bool:
    """True if a process has this file, or one in this directory, open; False if it has ended."""
    with contextlib.suppress(psutil.Error):
        return any(Path(each.path).is_relative_to(path.resolve()) for each in process.open_files())
    return False


def has_started(run_dir: RunDir, attempt: int) -> bool:
    """True if the process of an attempt has opened the run or logged anything; else it may never have started."""
    opened = run_dir.process()
    if opened is not None and opened.attempt == attempt:
        return True
    try:
        return run_dir.log_path(attempt).stat().st_size > 0
    except FileNotFoundError:
        return False


def end_leftover(run_dir: RunDir) -> None:
    """Kills a process of an earlier attempt that still holds the run; its writes are already fenced off."""
    record = run_dir.locked_by_live_process()
    if record is not None:
        AdoptedProcess(record).send(signal.SIGKILL)
        with contextlib.suppress(psutil.Error):
            psutil.Process(record.pid).wait(timeout=10)


def oom_kills() -> int:
    """Number of OOM kills in this control group if known, else on this machine."""
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with contextlib.suppress(OSError, ValueError):
            for line in Path(path).read_text().splitlines():
                name, _, value = line.partition(" ")
                if name == "oom_kill":
                    return int(value)
    return 0
