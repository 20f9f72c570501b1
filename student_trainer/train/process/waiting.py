"""Waiting for a teacher: says so in the run's condition, gives up after retry.teacher_wait_s, and ends at once when the run shall stop."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.run_dir import Attempt

log = structlog.get_logger()

POLL_S = 0.2
"""Between two looks at the stop flag while waiting."""
WAITING = "WAITING_FOR_TEACHER"


class Stopped(Exception):  # noqa: N818 - not an error: the run was asked to stop
    """The run was asked to stop while it waited."""


class Patience:
    """One process's patience with its teacher; used from the main thread alone."""

    def __init__(self, attempt: Attempt, stop_requested: Callable[[], bool], wait_s: float) -> None:
        self._attempt = attempt
        self._stop_requested = stop_requested
        self._wait_s = wait_s
        self._reported = False

    def check(self, waiting_since: float | None, why: str = "") -> None:
        """Return if waiting may go on; call it every POLL_S.

        `waiting_since` is the monotonic time since which no teacher answers, None while one does.

        Raises:
            Stopped: the run shall stop.
            StillhouseError: TEACHER_UNREACHABLE once the wait has lasted too long.
        """
        if self._stop_requested():
            raise Stopped
        if waiting_since is None:
            self.clear()
            return
        if not self._reported:
            self._reported = True
            self._attempt.report("condition", condition=WAITING)
            log.warning("waiting for the teacher", why=why, at_most_s=self._wait_s)
        if time.monotonic() - waiting_since > self._wait_s:
            raise StillhouseError(
                Reason.TEACHER_UNREACHABLE,
                f"No teacher answered for {self._wait_s:g} s (retry.teacher_wait_s). {why} "
                "Resume the run once one answers; nothing up to the last checkpoint is lost.",
            )

    def sleep(self, duration_s: float, waiting_since: float | None, why: str = "") -> None:
        """Wait so long, with checks in between; raises as `check` does."""
        deadline = time.monotonic() + duration_s
        while True:
            self.check(waiting_since, why)
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return
            time.sleep(min(POLL_S, left_s))

    def clear(self) -> None:
        """Say that the teacher answers."""
        if self._reported:
            self._reported = False
            self._attempt.report("condition", condition="")
            log.info("the teacher answers")
