"""Returns free heap memory of a worker on a CPU to the host.

PyTorch allocates a step's tensors from the C library, whose heap grows with each new mixture of sizes, and shrinks
only at its end.
"""

from __future__ import annotations

import ctypes
import threading

INTERVAL_S = 5.0


def trim_regularly(interval_s: float = INTERVAL_S) -> threading.Event | None:
    """Starts a thread that trims the heap until the event is set; None where the C library cannot (glibc can).

    A call takes some milliseconds, in which allocations wait.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return None
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(interval_s):
            trim(ctypes.c_size_t(0))

    threading.Thread(target=run, name="stillhouse-trim", daemon=True).start()
    return ended
