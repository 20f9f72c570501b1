"""Bounded waits for services: backoff with jitter, ended at once by a stop and with one error at the limit."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

from stillhouse.protos.errors import StillhouseError

POLL_S = 0.2
"""Longest time between two looks at the stop flag."""
FIRST_BACKOFF_S = 0.2
MAX_BACKOFF_S = 15.0


class Clock:
    """Monotonic time, and waiting on it; a test passes its own."""

    def now_s(self) -> float:
        """Returns seconds since an arbitrary moment."""
        return time.monotonic()

    def wait(self, condition: threading.Condition, timeout_s: float | None) -> None:
        """Waits for a notification of `condition`, whose lock is held."""
        condition.wait(timeout_s)

    def sleep(self, duration_s: float) -> None:
        """Sleeps."""
        time.sleep(duration_s)


def backoff_s(attempt: int, error: StillhouseError | None = None) -> float:
    """Pause in seconds after failed attempt number `attempt`, from 0: exponential with jitter, or as the service asks."""
    pause_s = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(attempt, 10))
    asked_s = min((error.retry_after_s if error else None) or 0.0, MAX_BACKOFF_S)
    return max(pause_s, asked_s) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter


class BoundedWait:
    """Limits how long a caller waits for services; a program overrides the hooks to report and to stop."""

    def __init__(
        self,
        limit_s: float,
        *,
        on_pause: Callable[[StillhouseError, float], object] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """`limit_s` without an answer is the longest wait; `on_pause` is told the error and length of each pause."""
        self.limit_s = limit_s
        self._on_pause = on_pause
        self._clock = clock or Clock()
        self._attempt = 0
        self._since_s: float | None = None

    def check(self, silent_since_s: float | None, error: StillhouseError | None = None) -> None:
        """Returns if the wait may continue; called at least every POLL_S.

        `silent_since_s` is the monotonic time since which no service answers, None while one does; `error` says why.
        Raises what `give_up` returns once the limit is reached, and what `on_check` raises.
        """
        self.on_check()
        if silent_since_s is None:
            self.answered()
            return
        self.on_silence(error)
        if self._clock.now_s() - silent_since_s > self.limit_s:
            raise self.give_up(error)

    def pause(self, error: StillhouseError) -> None:
        """Sleeps before the next attempt, longer after each failure in a row; raises as `check` does."""
        if self._since_s is None:
            self._since_s = self._clock.now_s()
        self.check(self._since_s, error)
        pause_s = backoff_s(self._attempt, error)
        self._attempt += 1
        if self._on_pause is not None:
            self._on_pause(error, pause_s)
        until_s = self._clock.now_s() + pause_s
        while (left_s := until_s - self._clock.now_s()) > 0:
            self._clock.sleep(min(POLL_S, left_s))
            self.check(self._since_s, error)

    def answered(self) -> None:
        """Starts again: a service answers."""
        self._attempt, self._since_s = 0, None

    def on_check(self) -> None:
        """Runs at every check; raises to end the wait."""

    def on_silence(self, error: StillhouseError | None) -> None:
        """Runs at every check while no service answers."""

    def give_up(self, error: StillhouseError | None) -> BaseException:
        """Returns the error that ends the wait at its limit."""
        return error or TimeoutError(f"no service answered for {self.limit_s:g} s")
