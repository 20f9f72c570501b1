"""Starts Stillhouse's services as processes and ends them with all their descendants, whatever happens in between."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

STOP_GRACE_S = 20.0
POLL_S = 0.05
SHARED_CORES = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment of programs that share cores: threads that wait for work sleep instead of spinning, which would slow the
others, and themselves, several times over."""
WITHOUT_STANDBY = {"STILLHOUSE_TRAINER_STANDBY": "off"}
"""Environment of a run service whose queued runs take no cores from the test before they start."""

INTERPRETED_TRITON = {
    "PYTHONPATH": os.pathsep.join(
        [
            str(Path(__file__).parent / "interpreted_triton"),
            *filter(None, [os.environ.get("PYTHONPATH")]),
        ]
    )
}
"""Environment of a teacher whose vLLM runs its second model runner on a CPU."""


class ProgramError(RuntimeError):
    """A program ended, or did not say where it listens, in time; the message ends with its log."""


@dataclass(kw_only=True)
class Program:
    """A running service in a process group of its own.

    As a context manager it ends the service when the block ends, also by an exception.
    """

    name: str
    process: subprocess.Popen[bytes]
    log_path: Path
    target: str = ""
    """Address that it listens on, such as "127.0.0.1:41234"; empty for programs that do not listen."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Its process id, which is that of its group too."""
        return self.process.pid

    def log(self, max_bytes: int = 20_000) -> str:
        """The end of what it wrote to stdout and stderr."""
        if not self.log_path.exists():
            return ""
        return self.log_path.read_bytes()[-max_bytes:].decode(errors="replace")

    def stop(self, grace_s: float = STOP_GRACE_S) -> int:
        """Its exit code after SIGTERM, or after SIGKILL if `grace_s` was not enough; no descendant outlives it."""
        descendants = self._descendants()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
        self._end(descendants)
        assert "nanobind" not in self.log(), "reports of extension modules follow the service's own lines"
        return self.process.returncode

    def kill(self) -> None:
        """Ends it and all its descendants at once with SIGKILL."""
        self._end(self._descendants())

    def _descendants(self) -> list[psutil.Process]:
        # Training processes lead groups of their own, so the service's group does not hold all of them.
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _end(self, descendants: Sequence[psutil.Process]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for process in descendants:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


def start_program(
    name: str,
    arguments: Sequence[str],
    *,
    directory: Path,
    wait_s: float = 120.0,
    environment: Mapping[str, str] | None = None,
    listens: bool = True,
    python: Path | str = sys.executable,
) -> Program:
    """Starts `python -m arguments...` with log and address file in `directory` and waits until it listens.

    `environment` is added to this process's own. Raises `ProgramError` with the end of its log when it ends first or
    needs longer than `wait_s`; nothing of it is left running then.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log_path, address_file = directory / f"{name}.log", directory / f"{name}.address"
    address_file.unlink(missing_ok=True)
    address_arguments = ["--address-file", str(address_file)] if listens else []
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [str(python), "-m", *arguments, *address_arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**SHARED_CORES, **os.environ, **(environment or {})},
            start_new_session=True,
        )
    program = Program(name=name, process=process, log_path=log_path)
    try:
        if listens:
            program.target = _wait_for_address(program, address_file, wait_s)
    except BaseException:
        program.kill()
        raise
    return program


def _wait_for_address(program: Program, address_file: Path, wait_s: float) -> str:
    deadline = time.monotonic() + wait_s
    while not address_file.exists():
        if program.process.poll() is not None:
            raise ProgramError(
                f"{program.name} ended with {program.process.returncode} before it listened. Its log:\n{program.log()}"
            )
        if time.monotonic() > deadline:
            raise ProgramError(
                f"{program.name} does not listen after {wait_s:g} s. Its log:\n{program.log()}"
            )
        time.sleep(POLL_S)
    return address_file.read_text().strip()


def start_teacher(
    model: Path,
    *,
    engine: str,
    directory: Path,
    options: Sequence[str] = (),
    name: str = "teacher",
    environment: Mapping[str, str] | None = None,
) -> Program:
    """A `stillhouse-teacher` on a free port of this machine."""
    return start_program(
        name,
        [
            "stillhouse.teacher_service",
            "--model",
            str(model),
            "--engine",
            engine,
            "--listen",
            "127.0.0.1:0",
            *options,
        ],
        directory=directory,
        wait_s=240.0,
        environment=environment,
    )


def start_trainer(
    data_dir: Path,
    *,
    directory: Path,
    options: Sequence[str] = (),
    name: str = "trainer",
    environment: Mapping[str, str] | None = None,
) -> Program:
    """A `stillhouse-trainer` on a free port of this machine."""
    return start_program(
        name,
        ["stillhouse.student_trainer.runs", "--data-dir", str(data_dir), "--listen", "127.0.0.1:0", *options],
        directory=directory,
        environment={**WITHOUT_STANDBY, **(environment or {})},
    )
