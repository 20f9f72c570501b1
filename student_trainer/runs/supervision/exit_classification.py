"""Maps exit status and reported outcome of a training process to the run's next state. Pure."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from google.rpc.status_pb2 import Status

from stillhouse.protos.child_process import signal_name
from stillhouse.protos.errors import Reason, StillhouseError, from_status, to_status
from stillhouse.student_trainer.config.settled.micro_batch import MEMORY_ADVICE
from stillhouse.student_trainer.run_dir import EXIT_DISK_FULL
from stillhouse.student_trainer.runs.store import run_state
from stillhouse.student_trainer.runs.store.run_state import State
from stillhouse.student_trainer.runs.supervision.training_process import Exit

NO_RETRY = frozenset({Reason.OUT_OF_MEMORY, Reason.RUN_STATE})
"""Reasons for which a retry would fail the same way."""
KILLED_CODE = 128 + signal.SIGKILL


Overflow = Literal["log", "metrics"]
_TOO_MUCH: Mapping[Overflow, str] = {
    "log": "The process exceeded the log size of an attempt and was killed. Check what it repeats; if that is needed, start "
    "the service with a larger --max-log-bytes.",
    "metrics": "The process exceeded the size of a run's metrics and events and was killed. Evaluate less often or train for fewer "
    "steps; if all are needed, start the service with a larger --max-metric-bytes and resume the run.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptEnd:
    """Observations at the end of an attempt."""

    state: State
    """State of the run, a live one."""
    exit: Exit
    outcome: str | None
    """Reported by the process: completed, stopped or failed; None if it reported nothing."""
    error: Status | None
    """Error reported by the process."""
    killed_for_stop: bool
    """True if the service killed it for not exiting in time after a stop."""
    killed_for_silence: bool
    """True if the service killed it for lack of a heartbeat."""
    killed_for_memory: bool
    """True if the kernel's OOM killer has killed a process meanwhile."""
    log_tail: str
    """The last lines of its log."""
    may_retry: bool
    """True if an automatic retry is allowed."""
    overflowed: Overflow | None = None
    """The size limit for which the service killed it, if any."""
    may_halve: bool = False
    """True if a retry with half the micro-batch is allowed after running out of memory."""
    resumes_from: str = ""
    """The checkpoint that another attempt continues from, such as checkpoints/40; empty if there is nothing yet."""
    full_disk: str = ""
    """Message for a full disk, if the process could not report it."""
    only_waited: bool = False
    """True if the process waited for the run before, and has made no step."""


def ran_out_of_memory(error: Status | None) -> bool:
    """True if an attempt ran out of memory, or got a SIGKILL of unknown origin, which mostly means the same."""
    if error is None:
        return False
    cause = from_status(error)
    killed = cause.reason is Reason.PROCESS_DIED and cause.metadata.get("exit_code") == str(KILLED_CODE)
    return cause.reason is Reason.OUT_OF_MEMORY or killed


def begins_again(ending: AttemptEnd) -> bool:
    """True if the run begins again in a process of its own, as a signal ended the one that had waited for it."""
    by_service = ending.killed_for_stop or ending.killed_for_silence or ending.overflowed is not None
    return (
        ending.only_waited
        and ending.exit.signal != 0
        and ending.outcome is None
        and not by_service
        and ending.state != run_state.STOPPING
    )


def classify(ending: AttemptEnd) -> tuple[State, Status | None]:
    """The run's next state, and the attempt's error, if any."""
    if ending.outcome == "completed":
        # Also if it completed before a stop request, or before its start was recorded.
        return run_state.COMPLETED, None
    if ending.outcome == "stopped" and ending.state == run_state.STOPPING:
        return run_state.STOPPED, None
    error = (
        ending.error if ending.outcome == "failed" and ending.error is not None else to_status(_death(ending))
    )
    if ending.outcome is None and ending.killed_for_stop:
        return run_state.STOPPED, error
    return _failed_or_retry(ending, error), error


def _failed_or_retry(ending: AttemptEnd, error: Status) -> State:
    """PENDING if a retry may help, else FAILED; a run with a stop request is not retried."""
    cause = from_status(error)
    if begins_again(ending):
        return run_state.PENDING
    if (
        ending.may_halve
        and not ending.overflowed
        and ran_out_of_memory(error)
        and ending.state != run_state.STOPPING
    ):
        return run_state.PENDING
    helps = cause.retryable and cause.reason not in NO_RETRY
    return (
        run_state.PENDING
        if helps and ending.may_retry and ending.state != run_state.STOPPING
        else run_state.FAILED
    )


def _death(ending: AttemptEnd) -> StillhouseError:
    """The error of a process that reported none."""
    number, code = ending.exit.signal, ending.exit.code
    # A process killed from outside could not log the cause.
    may_log = number not in (signal.SIGKILL, signal.SIGTERM)
    tail = f" Last log lines: {ending.log_tail}" if ending.log_tail and may_log else ""
    metadata = {"exit_code": str(code), "signal": str(number)}
    resume = f"`run resume` {_start_of_resume(ending)}."
    if ending.overflowed:
        sentence = f"{_TOO_MUCH[ending.overflowed]} Last log lines: {ending.log_tail}"
        return StillhouseError(Reason.QUOTA, sentence, metadata=metadata)
    if ending.killed_for_stop:
        sentence = f"The process did not exit in time after a stop request and was killed; {resume}"
        return StillhouseError(Reason.PROCESS_DIED, sentence + tail, metadata=metadata)
    if ending.killed_for_silence:
        sentence = (
            "The process sent no heartbeat for longer than the service's --max-silence-s and was killed; "
            f"check whether its host or disk hangs. {resume}"
        )
        return StillhouseError(Reason.PROCESS_DIED, sentence + tail, metadata=metadata)
    if ending.outcome == "stopped":
        sentence = "The process saved a checkpoint and exited on a signal from outside this service, such as a SIGTERM; `run resume` continues from there."
        return StillhouseError(Reason.PROCESS_DIED, sentence, metadata=metadata)
    if code == EXIT_DISK_FULL:
        return StillhouseError(Reason.DISK_FULL, ending.full_disk, metadata=metadata)
    if begins_again(ending):
        sentence = f"The process had waited for the run and was ended by {signal_name(number)} before its first step; the run begins again in a new one."
        return StillhouseError(Reason.PROCESS_DIED, sentence, metadata=metadata)
    if number == signal.SIGKILL and ending.killed_for_memory:
        sentence = f"The kernel's OOM killer killed the process (exit 137). {MEMORY_ADVICE} {resume}"
        return StillhouseError(Reason.OUT_OF_MEMORY, sentence + tail, metadata=metadata)
    if code == KILLED_CODE:
        sentence = (
            f"The process was killed (exit 137), most likely for lack of memory. {MEMORY_ADVICE} {resume}"
        )
    elif number:
        sentence = f"The process was ended by {signal_name(number)}; {resume}"
    elif code is None:
        sentence = f"The process ended while the service was not running; {resume}"
    else:
        sentence = f"The process ended with code {code} and reported no error; {resume}"
    return StillhouseError(Reason.PROCESS_DIED, sentence + tail, metadata=metadata)


def _start_of_resume(ending: AttemptEnd) -> str:
    if ending.resumes_from:
        return f"continues from {ending.resumes_from}"
    return "begins again at the first step, because the run has no checkpoint yet"
