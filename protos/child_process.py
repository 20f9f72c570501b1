"""Processes that a program starts of its own package: where they find it, and their end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import stillhouse

PACKAGE_ROOT = Path(stillhouse.__file__).resolve().parents[1]


def python_path() -> str:
    """PYTHONPATH of a child: it finds the package also from a source tree, and in any working directory."""
    paths = [str(PACKAGE_ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.pathsep.join(dict.fromkeys(str(Path(path).resolve()) for path in paths))


def signal_name(number: int) -> str:
    """Name of a signal that ended a process, such as SIGKILL."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


async def end_process(process: asyncio.subprocess.Process, *, grace_s: float) -> None:
    """Ends a process that leads a session: by SIGTERM, after `grace_s` by SIGKILL for all of its group."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(grace_s):
            await process.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
