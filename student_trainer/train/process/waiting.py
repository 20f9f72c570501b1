"""Waits for a teacher: reported as the run's condition, limited by retry.teacher_wait_s, ended at once when the run shall stop."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.pool.bounded_wait import BoundedWait
from stillhouse.student_trainer.run_dir import Attempt

log = structlog.get_logger()

WAITING = "WAITING_FOR_TEACHER"


class Deadline(BoundedWait):
    """A wait that goes on when the run shall stop, and ends with TimeoutError at its limit."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(limit_s)
        self._until_s = self._clock.now_s() + limit_s

    def on_check(self) -> None:
        """Raises TimeoutError once the time is up."""
        if self._clock.now_s() > self._until_s:
            raise TimeoutError(f"they were not there after {self.limit_s:g} s")

    def give_up(self, error: StillhouseError | None) -> TimeoutError:
        """Returns TimeoutError: services that were silent for the limit may answer a later wait."""
        return TimeoutError(f"no service answered for {self.limit_s:g} s. {error.message if error else ''}")


class Stopped(Exception):  # noqa: N818 - not an error: the run was asked to stop
    """The run was asked to stop while it waited."""


class TeacherWait(BoundedWait):
    """The wait of one training process for its teachers; used from the main thread alone."""

    def __init__(self, attempt: Attempt, stop_requested: Callable[[], bool], wait_s: float) -> None:
        """`check` and `pause` raise Stopped once `stop_requested`, and TEACHER_UNREACHABLE after `wait_s`."""
        super().__init__(wait_s)
        self.reported_limit_s = wait_s
        """Limit in the log: shorter than `limit_s` for a teacher that the run never reached."""
        self._run_attempt = attempt
        self._stop_requested = stop_requested
        self._reported = False

    def on_check(self) -> None:
        """Raises Stopped if the run shall stop."""
        if self._stop_requested():
            raise Stopped

    def on_silence(self, error: StillhouseError | None) -> None:
        """Reports that the run waits."""
        if not self._reported:
            self._reported = True
            self._run_attempt.report("condition", condition=WAITING)
            log.warning(
                "waiting for the teacher", why=error and error.message, at_most_s=self.reported_limit_s
            )

    def answered(self) -> None:
        """Reports that the teacher answers."""
        super().answered()
        self.reported_limit_s = self.limit_s
        if self._reported:
            self._reported = False
            self._run_attempt.report("condition", condition="")
            log.info("the teacher answers")

    def give_up(self, error: StillhouseError | None) -> StillhouseError:
        """Returns TEACHER_UNREACHABLE with the last error's sentence."""
        return StillhouseError(
            Reason.TEACHER_UNREACHABLE,
            f"No teacher answered for {self.limit_s:g} s (retry.teacher_wait_s). {f'{error.message} ' if error else ''}"
            "Resume the run once one answers; nothing up to the last checkpoint is lost.",
        )
