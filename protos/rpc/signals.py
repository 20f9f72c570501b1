"""Signals that end a program, kept until its server serves."""

from __future__ import annotations

import asyncio
import signal

END_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def keep_signals() -> asyncio.Queue[signal.Signals]:
    """Keeps SIGTERM and SIGINT of the running loop from now on; before it they would end the program at once."""
    kept: asyncio.Queue[signal.Signals] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in END_SIGNALS:
        loop.add_signal_handler(number, kept.put_nowait, number)
    return kept
