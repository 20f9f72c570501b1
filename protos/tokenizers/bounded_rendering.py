"""Bounds the rendering of a chat template, a program of the model's author that may loop: in CPU time, memory and length."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RENDER_S = 10.0
"""CPU time for one conversation; a usual template takes milliseconds."""
MAX_GROWTH_BYTES = 1 << 30
"""Memory that the process may take while one conversation is rendered; looked at every _POLL_S."""
MAX_RENDERED_CHARACTERS = 1 << 24
MAX_TEMPLATE_CHARACTERS = 1 << 20
_LEAST_S = 0.02
"""CPU time below which a rendering is not what the process grew by: a usual one beside a model that is loaded."""
_POLL_S = 0.1

_lock = threading.Lock()
_running: dict[int, tuple[int, float, float]] = {}
"""Thread to the clock of its CPU time, and the times on it at which its rendering began and is to be ended; a new tuple for each."""
_interrupts: dict[int, type[_TookTooLong]] = {}
"""Thread to what its rendering was ended by."""
_watcher: threading.Thread | None = None


class RenderingTooLarge(ValueError):  # noqa: N818 - the other half of a sentence that its caller begins
    """A template that takes too long, or that is or writes too much; its text completes a sentence about it."""


@contextmanager
def bounded_rendering(limit_s: float | None = None) -> Iterator[None]:
    """Raises RenderingTooLarge in the block once this thread has computed in it for `limit_s`, by default RENDER_S, or the
    process has grown by more than MAX_GROWTH_BYTES meanwhile."""
    if not hasattr(time, "pthread_getcpuclockid"):  # as on macOS
        yield
        return
    thread = threading.get_ident()
    clock = time.pthread_getcpuclockid(thread)
    _watch(thread, clock, RENDER_S if limit_s is None else limit_s)
    try:
        try:
            yield
        finally:
            with _lock:
                _running.pop(thread, None)
                interrupt = _interrupts.pop(thread, None)
            if interrupt is not None:
                _wait_for_interrupt()
                raise interrupt
    except _TookTooMuch:
        raise RenderingTooLarge(f"it takes more than {MAX_GROWTH_BYTES >> 20} MiB of memory") from None
    except _TookTooLong:
        raise RenderingTooLarge(f"it still runs after {limit_s or RENDER_S:g} s of computing") from None


def checked_length(text: str) -> str:
    """Returns a rendered text. Raises RenderingTooLarge for one that is too long."""
    if len(text) > MAX_RENDERED_CHARACTERS:
        raise RenderingTooLarge(
            f"it writes {len(text)} characters; at most {MAX_RENDERED_CHARACTERS} are read"
        )
    return text


def checked_template(template: str) -> str:
    """Returns the source of a template. Raises RenderingTooLarge for one that is too long."""
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise RenderingTooLarge(
            f"it has {len(template)} characters; at most {MAX_TEMPLATE_CHARACTERS} are read"
        )
    return template


class _TookTooLong(Exception):  # noqa: N818 - never leaves this file
    """Raised in the thread that renders."""


class _TookTooMuch(_TookTooLong):
    """Raised likewise."""


def _watch(thread: int, clock: int, limit_s: float) -> None:
    global _watcher  # noqa: PLW0603 - one thread watches all others, for it would cost more than most renderings
    begin = time.clock_gettime(clock)
    with _lock:
        _running[thread] = (clock, begin, begin + limit_s)
        if _watcher is None or not _watcher.is_alive():
            _watcher = threading.Thread(target=_end_long_ones, name="rendering", daemon=True)
            _watcher.start()


def _end_long_ones() -> None:
    """Interrupts renderings at their end; returns when there was none for some time."""
    global _watcher  # noqa: PLW0603
    idle_s = 0.0
    resident_bytes = _resident_bytes()
    seen: dict[int, tuple[tuple[int, float, float], int]] = {}
    """Thread to its rendering, and the memory of the process when it was not there yet."""
    while True:
        time.sleep(_POLL_S)
        before_bytes, resident_bytes = resident_bytes, _resident_bytes()
        with _lock:
            idle_s = 0.0 if _running else idle_s + _POLL_S
            for thread, rendering in list(_running.items()):
                if thread not in seen or seen[thread][0] is not rendering:
                    seen[thread] = rendering, before_bytes
                clock, begin, end = rendering
                now = time.clock_gettime(clock)
                has_grown = resident_bytes - seen[thread][1] > MAX_GROWTH_BYTES
                kind = (
                    _TookTooLong
                    if now > end
                    else _TookTooMuch
                    if has_grown and now - begin > _LEAST_S
                    else None
                )
                if kind:
                    del _running[thread]
                    _interrupts[thread] = kind
                    _interrupt(thread, kind)
            seen = {thread: each for thread, each in seen.items() if thread in _running}
            if idle_s > RENDER_S:
                _watcher = None
                return


def _resident_bytes() -> int:
    """Returns the memory that this process has; 0 where the system does not tell."""
    try:
        with Path("/proc/self/statm").open("rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")
    except OSError:
        return 0


def _interrupt(thread: int, kind: type[BaseException]) -> None:
    """Has an exception raised in a thread at one of its next instructions."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(kind))


def _wait_for_interrupt() -> None:
    """Lets an exception that was requested for this thread be raised here, and not later in another place.

    Taking it back (a request for NULL) would leave CPython 3.11 looking for it at every call, for ever, and would hang a
    thread that is traced.
    """
    for _ in range(1000):  # it is raised at the end of a round, if it was not yet
        pass
