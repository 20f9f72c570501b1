"""What the end of a training process means for its run: a pure function of what was seen."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from google.rpc.status_pb2 import Status

from stillhouse.protos.errors import Reason, StillhouseError, from_status, to_status
from stillhouse.student_trainer.run_dir import EXIT_DISK_FULL
from stillhouse.student_trainer.runs.store import run_state
from stillhouse.student_trainer.runs.store.run_state import State
from stillhouse.student_trainer.runs.supervision.training_process import Exit

NO_RETRY = frozenset({Reason.OUT_OF_MEMORY, Reason.RUN_STATE})
"""Reasons after which another attempt would end in the same way."""
KILLED_CODE = 128 + signal.SIGKILL
MEMORY_ADVICE = (
    "Lower optimizer.micro_batch_size and raise optimizer.grad_accum_steps by the same factor, which "
    "retry.halve_micro_batch does by itself, set student.gradient_checkpointing, quantise the base with "
    "student.quantization, or give the host more memory; `run resume` goes on from the last checkpoint."
)


Overflow = Literal["log", "metrics"]
_TOO_MUCH: Mapping[Overflow, str] = {
    "log": "The process wrote more log than one attempt may, and was killed. See what it repeats; if it has to, start the "
    "service with a larger --max-log-bytes.",
    "metrics": "The process wrote more metrics and events than a run may, and was killed. Evaluate less often or take fewer "
    "steps; if it has to be so many, start the service with a larger --max-metric-bytes and resume the run.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class AttemptEnd:
    """What was seen of an attempt's end."""

    state: State
    """The run's, which is a live one."""
    exit: Exit
    outcome: str | None
    """completed, stopped or failed, as the process said; None if it said nothing."""
    error: Status | None
    """Why it failed, as the process said."""
    killed_for_stop: bool
    """Whether the service killed it because it did not end in time after a stop."""
    killed_for_silence: bool
    """Whether the service killed it because it gave no sign of life for too long."""
    killed_for_memory: bool
    """Whether the kernel has killed a process for memory meanwhile."""
    log_tail: str
    """The last lines of its log."""
    may_retry: bool
    """Whether another process may be started without being asked."""
    overflowed: Overflow | None = None
    """What outgrew its limit, if the service killed it because of that."""
    may_halve: bool = False
    """Whether one with half the micro-batch may be, if memory ran out."""
    full_disk: str = ""
    """What to say of the run's disk if the process had no room for a word."""


def ran_out_of_memory(error: Status | None) -> bool:
    """Whether an attempt ended for want of memory, or by a SIGKILL of nobody knows whom, which mostly means it."""
    if error is None:
        return False
    cause = from_status(error)
    killed = cause.reason is Reason.PROCESS_DIED and cause.metadata.get("exit_code") == str(KILLED_CODE)
    return cause.reason is Reason.OUT_OF_MEMORY or killed


def classify(ending: AttemptEnd) -> tuple[State, Status | None]:
    """The state that follows, and the attempt's error, if it had one."""
    if ending.outcome == "completed":
        # A run that was done before it was asked to stop, or before it was seen to start, is done.
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
    """PENDING if another attempt may help, else FAILED; a run that was asked to stop is not retried."""
    cause = from_status(error)
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
    """The error of a process that ended without a word."""
    number, code = ending.exit.signal, ending.exit.code
    # A process that was killed from outside had no time to write why.
    told = number not in (signal.SIGKILL, signal.SIGTERM)
    tail = f" Its log ends: {ending.log_tail}" if ending.log_tail and told else ""
    metadata = {"exit_code": str(code), "signal": str(number)}
    if ending.overflowed:
        sentence = f"{_TOO_MUCH[ending.overflowed]} Its log ends: {ending.log_tail}"
        return StillhouseError(Reason.QUOTA, sentence, metadata=metadata)
    if ending.killed_for_stop:
        sentence = "The process did not end in time after it was asked to stop, and was killed; `run resume` goes on from the last checkpoint."
        return StillhouseError(Reason.PROCESS_DIED, sentence + tail, metadata=metadata)
    if ending.killed_for_silence:
        sentence = (
            "The process gave no sign of life for longer than the service's --max-silence-s, and was killed; "
            "see whether its host or disk hangs. `run resume` goes on from the last checkpoint."
        )
        return StillhouseError(Reason.PROCESS_DIED, sentence + tail, metadata=metadata)
    if ending.outcome == "stopped":
        sentence = "The process wrote a checkpoint and ended because something else than this service told it to, such as a SIGTERM; `run resume` goes on from there."
        return StillhouseError(Reason.PROCESS_DIED, sentence, metadata=metadata)
    if code == EXIT_DISK_FULL:
        return StillhouseError(Reason.DISK_FULL, ending.full_disk, metadata=metadata)
    if number == signal.SIGKILL and ending.killed_for_memory:
        sentence = f"The kernel killed the process for memory (exit 137). {MEMORY_ADVICE}"
        return StillhouseError(Reason.OUT_OF_MEMORY, sentence + tail, metadata=metadata)
    if code == KILLED_CODE:
        sentence = (
            f"The process was killed (exit 137), which mostly means that memory ran out. {MEMORY_ADVICE}"
        )
    elif number:
        name = signal.Signals(number).name if number in signal.valid_signals() else str(number)
        sentence = f"The process was ended by {name}; `run resume` goes on from the last checkpoint."
    elif code is None:
        sentence = "The process ended while the service was not running; `run resume` goes on from the last checkpoint."
    else:
        sentence = f"The process ended with code {code} and did not say why; `run resume` tries again."
    return StillhouseError(Reason.PROCESS_DIED, sentence + tail, metadata=metadata)
