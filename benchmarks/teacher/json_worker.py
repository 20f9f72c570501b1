"""Child process with requests in JSON lines on stdin and one response each on stdout."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from tests.support.programs import SHARED_CORES, ProgramError

LOG_BYTES = 4000


class LineProcess:
    """Started by the constructor; `wait_ready` returns its first line, `request` its responses, `stop` ends it."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        log_path: Path,
        python: Path | str = sys.executable,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._module, self._log_path = module, log_path
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [str(python), "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**SHARED_CORES, **os.environ, **(environment or {})},
            )

    def wait_ready(self) -> Any:
        """Returns the first line. Raises `ProgramError` with the end of its log if it exits instead."""
        return self._answer()

    def request(self, **request: Any) -> Any:
        """Sends a request; returns its response. Raises `ProgramError` if it fails or the process exits."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended() from error
        return self._answer()

    def stop(self) -> None:
        """Kills it and all its descendants."""
        with contextlib.suppress(psutil.NoSuchProcess):
            family = psutil.Process(self._process.pid)
            for process in (*family.children(recursive=True), family):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise ProgramError(f"{self._module}: {answer['error']}")
        return answer

    def _ended(self) -> ProgramError:
        log = self._log_path.read_bytes()[-LOG_BYTES:].decode(errors="replace")
        return ProgramError(f"{self._module} ended. Its log:\n{log}")


def keep_stdout() -> Any:
    """Reserves this process's stdout for responses: all other output, also of children, goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


async def serve_lines(answers: Any, ready: Any, answer: Callable[[dict[str, Any]], Awaitable[Any]]) -> None:
    """Writes `ready`, then responds to requests until stdin ends; an exception is a response too."""
    print(json.dumps(ready), file=answers, flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        try:
            result = await answer(json.loads(line))
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), file=answers, flush=True)
