"""Processes that encode blocks beside this one; they start while it encodes the first rows itself."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any, Self

import structlog

from stillhouse.protos.child_process import python_path
from stillhouse.student_trainer.train.data.chat.mask import Learned
from stillhouse.student_trainer.train.data.prepared.block import Block
from stillhouse.student_trainer.train.data.prepared.identity import tokenizer_digest
from stillhouse.student_trainer.train.data.prepared.settings import ExampleSettings
from stillhouse.student_trainer.train.data.readers import DatasetRow

log = structlog.get_logger()

BLOCKS_AHEAD = 2
"""Blocks that a process has at once: one that it encodes, and the next."""
MAX_WORKERS = 64


class Workers:
    """Encoding processes; a context manager that ends them."""

    def __init__(self, tokenizer: Any, settings: ExampleSettings, number: int) -> None:
        """Starts `number` processes; they are `ready` later."""
        self._processes: list[_Worker] = []
        self._results: queue.SimpleQueue[tuple[int, int, Block | None]] = queue.SimpleQueue()
        try:
            start = pickle.dumps((tokenizer, settings), protocol=5)
        except Exception as error:
            log.info(
                "one process encodes the data, since its tokenizer cannot be sent to others", why=str(error)
            )
            return
        digest = tokenizer_digest(tokenizer).encode()
        for place in range(min(number, MAX_WORKERS)):
            try:
                self._processes.append(_Worker(place, start, digest, self._results))
            except (OSError, RuntimeError) as error:  # no more processes, files or threads
                log.info("fewer processes encode the data", number=place, why=str(error))
                break

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._processes:
            each.kill()

    @property
    def room(self) -> int:
        """Blocks that processes would take now, without those that have not started yet, or ended."""
        return sum(max(0, BLOCKS_AHEAD - each.num_blocks) for each in self._processes if each.ready)

    def submit(self, number: int, rows: Sequence[DatasetRow], learned: Learned) -> None:
        """Sends block `number` to the process with the fewest; there must be `room`."""
        ready = [each for each in self._processes if each.ready]
        min(ready, key=lambda each: each.num_blocks).submit(number, pickle.dumps((rows, learned), protocol=5))

    def result(self, wait_s: float) -> tuple[int, Block | None] | None:
        """The next finished block with its number; the block is None if its process failed at it. None after `wait_s`."""
        try:
            place, number, block = self._results.get(timeout=wait_s)
        except queue.Empty:
            return None
        self._processes[place].num_blocks -= 1
        return number, block


class _Worker:
    """One process, and the thread that receives from it."""

    def __init__(
        self,
        place: int,
        start: bytes,
        digest: bytes,
        results: queue.SimpleQueue[tuple[int, int, Block | None]],
    ) -> None:
        self._place = place
        self._digest = digest
        self._results = results
        self._numbers: deque[int] = deque()
        self._lock = threading.Lock()
        self._ended = False
        self.num_blocks = 0
        """Blocks that it was sent, and whose results were not taken."""
        self.ready = False
        """It takes blocks."""
        ours, its = socket.socketpair()
        python = [sys.executable, *(["-P"] if sys.flags.safe_path else [])]
        command = [*python, "-m", "stillhouse.student_trainer.train.data.prepared.worker", str(its.fileno())]
        try:
            with its:
                self._process = subprocess.Popen(
                    command, env=_environment(), stdin=subprocess.DEVNULL, pass_fds=[its.fileno()]
                )
        except OSError:
            ours.close()
            raise
        self._socket = Connection(ours.detach())
        self._receiver = threading.Thread(target=self._receive, args=[start], name="encoding", daemon=True)
        self._receiver.start()

    def submit(self, number: int, task: bytes) -> None:
        self.num_blocks += 1
        with self._lock:
            if self._ended:
                self._results.put((self._place, number, None))
                return
            self._numbers.append(number)
        with contextlib.suppress(OSError):  # the receiver gives its blocks back
            self._socket.send_bytes(task)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._receiver.join()
        self._socket.close()

    def _receive(self, start: bytes) -> None:
        try:
            self._socket.send_bytes(start)
            if self._socket.recv_bytes() != self._digest:
                log.info("a process would encode with another tokenizer and is not used")
                return
            self.ready = True
            while True:
                data = self._socket.recv_bytes()
                block = pickle.loads(data)  # noqa: S301 - of a process of this program
                with self._lock:
                    number = self._numbers.popleft()
                self._results.put((self._place, number, block))
        except (EOFError, OSError):
            pass
        finally:
            self.ready = False
            with self._lock:
                self._ended = True
                for number in self._numbers:
                    self._results.put((self._place, number, None))


def _environment() -> dict[str, str]:
    """The environment of a process that computes on one core and uses no device."""
    return {
        **os.environ,
        "PYTHONPATH": python_path(),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "RAYON_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
