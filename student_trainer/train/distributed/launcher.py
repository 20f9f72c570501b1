"""Launches the other ranks of a run on this host, monitors them, and ends them with the first process.

The first process owns the run directory; it starts the others before torch is imported, so that all load at once. If
one dies, the run ends with its cause; if the first ends in any way, the others see their standard input close and
exit. Processes started by torchrun are left to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import structlog
from google.rpc.status_pb2 import Status

from stillhouse.protos.child_process import python_path, signal_name
from stillhouse.protos.errors import Reason, StillhouseError, from_json, from_status, to_json, to_status
from stillhouse.protos.telemetry.host_cores import openmp_threads, usable_cores
from stillhouse.student_trainer.run_dir import EXIT_FAILED, Attempt
from stillhouse.student_trainer.train.distributed.rank_env import RankInfo, attribute_to_rank, timeout_s

if TYPE_CHECKING:
    from stillhouse.student_trainer.config.schema import RunConfig
    from stillhouse.student_trainer.train.distributed.ranks import Ranks

log = structlog.get_logger()

ERROR_VARIABLE = "STILLHOUSE_RANK_ERROR"
"""Path of the file to which a process started here writes its error."""
_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")
_LOOPBACK = "lo"
POLL_S = 0.2
FAILURE_GRACE_S = 10.0
"""Time that the first process has to notice the death of another one in its own calls."""
END_GRACE_S = 30.0
"""Time that the others have to end after the first."""


class RankProcesses:
    """The processes of one run; a context manager around all work of this one."""

    def __init__(
        self, config: RunConfig, attempt: Attempt, stopped: Callable[[], bool], given: RankInfo | None = None
    ) -> None:
        """`given` is this process's rank if torchrun or another process started it."""
        self.rank_info = given or RankInfo(size=config.resources.processes)
        self._config = config
        self._attempt = attempt
        self._stopped = stopped
        self._starts = given is None and self.rank_info.size > 1
        self._workers: dict[int, subprocess.Popen[bytes]] = {}
        self._listener: socket.socket | None = None
        self._errors: tempfile.TemporaryDirectory[str] | None = None
        self._closing = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._cause: StillhouseError | None = None
        self._ranks: Ranks | None = None

    def __enter__(self) -> Self:
        if self._starts:
            self._share_cores()
            self._start()
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends what was started. Raises the cause in place of `error` if that only reports a lost process."""
        lost = isinstance(error, StillhouseError) and error.reason is Reason.PROCESS_DIED
        if self._starts and lost:
            self._await_cause()
        self._closing.set()
        if self._ranks is not None and error is None:
            self._ranks.leave()
        if self._starts:
            self._watcher.join()
            self._end(at_once=error is not None)
        if self._ranks is not None and error is not None:
            self._ranks.abandon()
        if lost and self._cause is not None:
            raise self._cause from error

    def ranks(self) -> Ranks:
        """Connects all ranks and returns them; imports torch. Raises StillhouseError: INVALID_SPEC, PROCESS_DIED."""
        from stillhouse.student_trainer.train.distributed import ranks

        if self.rank_info.size == 1:
            return ranks.Ranks()
        store = self._store()
        # accelerate would read these and form groups of its own.
        for name in _TORCHRUN_VARIABLES:
            os.environ.pop(name, None)
        wait_s = self._config.retry.teacher_wait_s
        self._ranks = ranks.Ranks.join(self.rank_info, store, wait_s=wait_s)
        return self._ranks

    def _share_cores(self) -> None:
        """Divides the CPU threads among the processes; with GPUs the run service has done so."""
        if os.environ.get("CUDA_VISIBLE_DEVICES"):
            return
        threads = openmp_threads() or usable_cores()
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ[name] = str(max(1, threads // self.rank_info.size))

    def _start(self) -> None:
        """Starts all ranks but the first. Their traffic stays on the loopback device."""
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(self.rank_info.size)
        if Path("/sys/class/net", _LOOPBACK).exists():
            os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK)
        self._errors = tempfile.TemporaryDirectory(prefix="stillhouse-ranks-")
        python = [sys.executable, *(["-P"] if sys.flags.safe_path else [])]
        arguments = [str(self._attempt.run_dir.path), "--attempt", str(self._attempt.number), "--worker"]
        command = [*python, "-m", "stillhouse.student_trainer.train", *arguments]
        for rank in range(1, self.rank_info.size):
            self._workers[rank] = subprocess.Popen(
                command, env=self._environment(rank), stdin=subprocess.PIPE
            )
        log.info("processes started", pids=[each.pid for each in self._workers.values()])

    def _environment(self, rank: int) -> Mapping[str, str]:
        assert self._listener is not None
        return {
            **os.environ,
            "PYTHONPATH": python_path(),
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.rank_info.size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._listener.getsockname()[1]),
            ERROR_VARIABLE: str(self._error_path(rank)),
        }

    def _store(self) -> Any:
        """Opens the store through which the processes connect."""
        from datetime import timedelta

        from torch.distributed import TCPStore, rendezvous  # type: ignore[attr-defined]

        wait = timedelta(seconds=timeout_s())
        try:
            if self._listener is not None:
                port = self._listener.getsockname()[1]
                descriptor, self._listener = self._listener.detach(), None
                return TCPStore(
                    "127.0.0.1",
                    port,
                    is_master=True,
                    timeout=wait,
                    wait_for_workers=False,
                    master_listen_fd=descriptor,
                )
            if ERROR_VARIABLE in os.environ:
                port = int(os.environ["MASTER_PORT"])
                return TCPStore("127.0.0.1", port, is_master=False, timeout=wait, wait_for_workers=False)
            return next(iter(rendezvous("env://", timeout=wait)))[0]
        except (RuntimeError, ValueError) as error:
            raise StillhouseError(
                Reason.PROCESS_DIED,
                f"The processes of this run did not connect within {timeout_s():g} s: {error}.",
            ) from error

    def _watch(self) -> None:
        """Forwards a stop, and ends this process if another one has died and the main thread does not notice."""
        told = False
        while not self._closing.wait(POLL_S):
            if self._stopped() and not told:
                told = True
                for each in self._workers.values():
                    each.terminate()
            self._cause = self._find_cause()
            if self._cause is not None:
                break
        if self._cause is None or self._closing.wait(FAILURE_GRACE_S):
            return
        # The main thread waits for a lost process; it writes nothing meanwhile.
        log.error("run failed", why=self._cause.message)
        self._attempt.report("failed", error=to_json(to_status(self._cause)))
        for each in self._workers.values():
            each.kill()
        os._exit(EXIT_FAILED)

    def _await_cause(self) -> None:
        """Waits for a process whose connection is lost to exit, which may take a moment longer."""
        deadline = time.monotonic() + FAILURE_GRACE_S / 2
        while self._cause is None and time.monotonic() < deadline:
            time.sleep(POLL_S / 4)

    def _find_cause(self) -> StillhouseError | None:
        """Returns the error of a dead process; one that was killed or failed itself takes precedence over those that lost it."""
        codes = {rank: each.poll() for rank, each in self._workers.items()}
        dead = {rank: code for rank, code in codes.items() if code not in (None, 0)}
        causes = [self._cause_of(rank, code) for rank, code in dead.items() if code is not None]
        causes.sort(key=lambda cause: cause.metadata.get("noticed") == "1")
        return causes[0] if causes else None

    def _cause_of(self, rank: int, code: int) -> StillhouseError:
        try:
            told = from_status(from_json(json.loads(self._error_path(rank).read_text())))
        except (OSError, ValueError):
            how = f"was ended by {signal_name(-code)}" if code < 0 else f"ended with code {code}"
            return StillhouseError(
                Reason.PROCESS_DIED,
                f"Process {rank} of {self.rank_info.size} (from 0) {how} without an error message; `run resume` continues from the last "
                "checkpoint, or begins again if there is none.",
                metadata={"exit_code": str(code if code >= 0 else 128 - code), "signal": str(max(0, -code))},
            )
        noticed = told.reason is Reason.PROCESS_DIED
        told = attribute_to_rank(told, rank, self.rank_info.size)
        told.metadata["noticed"] = str(int(noticed))
        return told

    def _end(self, *, at_once: bool) -> None:
        deadline = time.monotonic() + (0 if at_once else END_GRACE_S)
        for each in self._workers.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                each.wait(max(0.0, deadline - time.monotonic()))
            if each.poll() is None:
                each.kill()
            each.wait()
            if each.stdin is not None:
                each.stdin.close()
        if self._listener is not None:
            self._listener.close()
        if self._errors is not None:
            self._errors.cleanup()

    def _error_path(self, rank: int) -> Path:
        assert self._errors is not None
        return Path(self._errors.name, str(rank))


def report_failure(status: Status) -> None:
    """Writes this process's error for the first process, if that started it."""
    path = os.environ.get(ERROR_VARIABLE)
    if path:
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps(to_json(status)))


def exit_with_first_process() -> None:
    """Exits this process as soon as the first one has ended: at the end of standard input."""

    def wait() -> None:
        # Not through sys.stdin, whose lock the interpreter takes at its end: it would abort.
        while os.read(sys.stdin.fileno(), 1024):
            pass
        os._exit(EXIT_FAILED)

    threading.Thread(target=wait, name="orphan", daemon=True).start()
