"""A process that encodes the rows of many requests: it loads a tokenizer once, and ends some time after the last one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import BinaryIO

import structlog
from google.rpc import status_pb2

from stillhouse.protos.errors import Reason, StillhouseError, from_status
from stillhouse.student_trainer.runs.supervision.training_process import environment

log = structlog.get_logger()

TIMEOUT_S = 300.0
IDLE_S = 30.0
"""Time for which a process without requests is kept."""
_REFUSED, _LENGTH_BYTES = b"\1", 8
"""Kind of answer, and size of lengths: those of train/inspect_rows.py."""
_MODULE = "stillhouse.student_trainer.train.inspect_rows"


class EncodingProcess:
    """The present process of a service, if there is one; for one request at a time."""

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._process: _Process | None = None
        self._ending: asyncio.TimerHandle | None = None

    async def ask(self, request: bytes) -> bytes:
        """The answer to a serialised InspectRowsRequest. Raises the StillhouseError that it refuses the request with."""
        self._cancel_end()
        if self._process is None or self._process.has_ended:
            self._process = await _Process.start(self._data_dir)
        try:
            kind, answer = await self._process.ask(request)
        except BaseException:  # it is dead, or amid an answer that nobody waits for any more
            await self.close()
            raise
        self._ending = asyncio.get_running_loop().call_later(IDLE_S, self._end)
        if kind == _REFUSED:
            raise from_status(status_pb2.Status.FromString(answer))
        return answer

    async def close(self) -> None:
        """Ends the process, if there is one."""
        self._cancel_end()
        process, self._process = self._process, None
        if process is not None:
            await process.end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()

    def _cancel_end(self) -> None:
        if self._ending is not None:
            self._ending.cancel()
            self._ending = None


class _Process:
    """A process of train/inspect_rows.py, which ends with its standard input."""

    def __init__(self, process: asyncio.subprocess.Process, said: BinaryIO) -> None:
        self._process = process
        self._said = said
        """Its standard error."""

    @classmethod
    async def start(cls, data_dir: Path) -> _Process:
        said = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the process
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", _MODULE, str(data_dir)),
            cwd=data_dir,
            env=environment(devices=(), threads=1, credentials=Path(os.devnull)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=said,
            start_new_session=True,
        )
        return cls(process, said)

    @property
    def has_ended(self) -> bool:
        return self._process.returncode is not None

    async def ask(self, request: bytes) -> tuple[bytes, bytes]:
        """The kind and the bytes of the answer. Raises StillhouseError if there is none."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                return await self._exchange(request)
        except TimeoutError as error:
            raise StillhouseError(
                Reason.INVALID_REQUEST,
                f"The rows were not encoded within {TIMEOUT_S:g} s. Send fewer, or shorter ones.",
            ) from error
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            code = await self._process.wait()
            self._said.seek(0)
            said = self._said.read().decode(errors="replace")
            log.error("rows were not inspected", exit=code, said=said[-2000:])  # noqa: TRY400 - of the process
            tail = " ".join(said.strip().splitlines()[-1:])
            raise StillhouseError(
                Reason.INTERNAL,
                f"The process that encodes rows ended with exit code {code} ({tail}); see the service's log.",
            ) from error

    async def _exchange(self, request: bytes) -> tuple[bytes, bytes]:
        into, out = self._process.stdin, self._process.stdout
        assert into is not None, "pipes"
        assert out is not None, "pipes"
        into.write(len(request).to_bytes(_LENGTH_BYTES) + request)
        await into.drain()
        head = await out.readexactly(1 + _LENGTH_BYTES)
        return head[:1], await out.readexactly(int.from_bytes(head[1:]))

    def kill(self) -> None:
        self._said.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def end(self) -> None:
        self.kill()
        await self._process.wait()
