"""One run of a batch's process: its order, its progress, its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from stillhouse.protos.child_process import end_process, python_path

STOP_S = 10.0
MAX_LINE_BYTES = 1 << 20
MODULE = "stillhouse.client.web.openai.batches.worker"


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessEnd:
    """End of a process."""

    done: bool = False
    """True if every row is in the output."""
    code: str = "PROCESS_DIED"
    message: str = "The process of the batch died."
    retryable: bool = True


async def run_process(order: Mapping[str, Any], progress: Callable[[int, int], None]) -> ProcessEnd:
    """Runs the worker; `progress` takes rows and those of them that failed. Ends the process if it is cancelled.

    The order, with its token, goes through a pipe: arguments and environment of a process may be read.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", MODULE),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": python_path(), "PYTHONUNBUFFERED": "1"},
        limit=MAX_LINE_BYTES,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    end = ProcessEnd()
    try:
        with contextlib.suppress(ConnectionError):
            process.stdin.write(json.dumps(order).encode() + b"\n")
            await process.stdin.drain()
        async for line in process.stdout:
            told = json.loads(line)
            if "rows" in told:
                progress(told["rows"], told["failed"])
            if "error" in told:
                end = ProcessEnd(**told["error"])
            elif told.get("done"):
                end = ProcessEnd(done=True)
        await process.wait()
        return end
    finally:
        await asyncio.shield(end_process(process, grace_s=STOP_S))
