"""A process that imports vLLM while the teacher does, and becomes vLLM's engine process: both take as long, one after the other.

vLLM starts its engine by multiprocessing's method "spawn": a new interpreter that imports everything again. `Warm` starts that
interpreter at once, and hands it what `spawn` would give a new one: the same descriptors under the same numbers, and the
environment. Where the environment that libraries read at import has changed since, or anything else is unexpected, `spawn` starts
its own.
"""

from __future__ import annotations

import array
import fcntl
import json
import os
import queue
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing import spawn, util
from typing import Any

from stillhouse.protos.import_scans import keep_scans

MODULES = (
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "stillhouse.teacher_service.engines.vllm.worker.extension",
)
READ_AT_IMPORT = ("OMP_", "GOMP_", "LD_PRELOAD")
"""Beginnings of the names of variables that are read when a process starts or loads its libraries, and that vLLM may set."""
_SPAWN = re.compile(r"spawn_main\(tracker_fd=(\d+), pipe_handle=(\d+)\)")
_MAX_BYTES = 1 << 20
_MAX_DESCRIPTORS = 64
_OWN_DESCRIPTOR = 200
"""Above the numbers that the teacher passes."""


class Warm:
    """The process that waits; for one start of vLLM, whose engine it becomes, or which ends it."""

    def __init__(self, modules: Sequence[str] = MODULES) -> None:
        self.used = False
        """True once multiprocessing has it."""
        self._socket, theirs = socket.socketpair()
        call = f"main({theirs.fileno()}, {tuple(modules)!r})"
        program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; {call}"
        options = util._args_from_interpreter_flags()  # type: ignore[attr-defined]
        executable: Any = spawn.get_executable()
        self._environ = _at_import(os.environ)
        # Not by subprocess, which would wait for a process that becomes multiprocessing's.
        self._spawn: Any = util.spawnv_passfds
        self.pid: int | None = self._spawn(
            executable, [os.fsdecode(executable), *options, "-c", program], [theirs.fileno()]
        )
        """Its number; None once it is used or ended."""
        theirs.close()

    @contextmanager
    def offered(self) -> Iterator[None]:
        """Within the context, the first process that multiprocessing spawns is this one; unused, it is ended."""
        util.spawnv_passfds = self._take  # type: ignore[assignment]
        try:
            yield
        finally:
            util.spawnv_passfds = self._spawn
            self.close()

    def close(self) -> None:
        """Ends the process if it was not used."""
        self._socket.close()
        pid, self.pid = self.pid, None
        if pid is not None:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def _take(self, path: bytes, arguments: Sequence[str], descriptors: Sequence[int]) -> int:
        found = next(filter(None, map(_SPAWN.search, map(str, arguments))), None)
        if found is None or self.pid is None or _at_import(os.environ) != self._environ:
            return int(self._spawn(path, arguments, descriptors))
        numbers = sorted(set(map(int, descriptors)))
        order = {
            "descriptors": numbers,
            "tracker_fd": int(found[1]),
            "pipe_handle": int(found[2]),
            "environ": dict(os.environ),
        }
        try:
            socket.send_fds(self._socket, [json.dumps(order).encode()], numbers)
            self._socket.shutdown(socket.SHUT_WR)
            is_ready = self._socket.recv(1) == b"y"
        except OSError:
            is_ready = False
        if not is_ready:
            self.close()
            return int(self._spawn(path, arguments, descriptors))
        pid, self.pid, self.used = self.pid, None, True
        self._socket.close()
        return pid


def _at_import(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith(READ_AT_IMPORT)}


def main(number: int, modules: Sequence[str]) -> None:
    """The process: imports, takes the place of a spawned one, and runs as such."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends with the teacher
    own = socket.socket(fileno=fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, _OWN_DESCRIPTOR))
    os.close(number)
    orders: queue.SimpleQueue[tuple[dict[str, Any], list[int]]] = queue.SimpleQueue()
    # In a thread: the teacher may end while libraries are imported.
    threading.Thread(target=_receive, args=(own, orders), name="warm", daemon=True).start()
    try:
        keep_scans()
        for name in modules:
            import_module(name)
        with suppress(
            ImportError
        ):  # vLLM renames its processes, which needs the environment where it was at the start
            import_module("setproctitle").getproctitle()
        order, received = orders.get()
        if not _place(received, order["descriptors"]):
            os._exit(0)
    except BaseException:  # multiprocessing starts its own process, which tells
        os._exit(1)
    _become(order["environ"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    own.sendall(b"y")
    own.close()
    sys.argv = ["-c", "--multiprocessing-fork"]
    spawn.spawn_main(tracker_fd=order["tracker_fd"], pipe_handle=order["pipe_handle"])


def _receive(own: socket.socket, orders: queue.SimpleQueue[tuple[dict[str, Any], list[int]]]) -> None:
    """Waits for the order and the descriptors of the teacher; ends this process if it closes its end without."""
    data, received = b"", array.array("i")
    room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * received.itemsize)
    try:
        while True:
            part, ancillary, _, _ = own.recvmsg(_MAX_BYTES, room)
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    received.frombytes(content[: len(content) - len(content) % received.itemsize])
            if not part:
                break
            data += part
        order = json.loads(data)
    except (OSError, ValueError):
        os._exit(0)
    orders.put((order, list(received)))


def _become(environ: Mapping[str, str]) -> None:
    """Makes the environment this one."""
    for name in set(os.environ) - set(environ):
        del os.environ[name]
    for name, value in environ.items():
        if os.environ.get(name) != value:
            os.environ[name] = value


def _place(received: Sequence[int], numbers: Sequence[int]) -> bool:
    """Gives received descriptors these numbers; False if one of them is taken here."""
    if len(received) != len(numbers):
        return False
    above = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, max(numbers) + 1) for each in received]
    for each in received:
        os.close(each)
    if any(map(_is_open, numbers)):
        return False
    for each, wanted in zip(above, numbers, strict=True):
        os.dup2(each, wanted)
        os.close(each)
    return True


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True
