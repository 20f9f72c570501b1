"""Exit classification, for every way in which a process can end."""

from __future__ import annotations

import dataclasses
import signal
from typing import Any

import pytest

from stillhouse.protos.errors import Reason, StillhouseError, from_status, to_status
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.student_trainer.run_dir import EXIT_DISK_FULL
from stillhouse.student_trainer.runs.store.run_state import (
    COMPLETED,
    FAILED,
    LIVE,
    PENDING,
    RUNNING,
    STOPPED,
    STOPPING,
    State,
    may_become,
)
from stillhouse.student_trainer.runs.supervision.exit_classification import AttemptEnd, classify
from stillhouse.student_trainer.runs.supervision.training_process import Exit

INVALID = to_status(StillhouseError(Reason.DATASET_INVALID, "Row 3 has no text."))
NO_MEMORY = to_status(StillhouseError(Reason.OUT_OF_MEMORY, "The training process ran out of memory."))
UNREACHABLE = to_status(StillhouseError(Reason.TEACHER_UNREACHABLE, "No teacher answers."))
BASE = AttemptEnd(
    state=RUNNING,
    exit=Exit(code=0),
    outcome=None,
    error=None,
    killed_for_stop=False,
    killed_for_silence=False,
    killed_for_memory=False,
    log_tail="",
    may_retry=False,
)
KILLED = Exit(code=137, signal=signal.SIGKILL)


def ended(**seen: Any) -> tuple[State, Reason | None, str]:
    state, error = classify(dataclasses.replace(BASE, **seen))
    known = from_status(error) if error is not None else None
    return state, known.reason if known else None, str(known or "")


@pytest.mark.parametrize(
    ("seen", "state", "reason"),
    [
        ({"outcome": "completed"}, COMPLETED, None),
        ({"outcome": "completed", "state": STOPPING}, COMPLETED, None),
        ({"outcome": "completed", "exit": KILLED}, COMPLETED, None),
        ({"outcome": "stopped", "state": STOPPING}, STOPPED, None),
        ({"outcome": "stopped"}, FAILED, Reason.PROCESS_DIED),
        ({"outcome": "stopped", "may_retry": True}, PENDING, Reason.PROCESS_DIED),
        ({"exit": KILLED, "killed_for_silence": True}, FAILED, Reason.PROCESS_DIED),
        ({"exit": KILLED, "killed_for_silence": True, "may_retry": True}, PENDING, Reason.PROCESS_DIED),
        ({"outcome": "failed", "error": INVALID}, FAILED, Reason.DATASET_INVALID),
        ({"outcome": "failed", "error": INVALID, "may_retry": True}, FAILED, Reason.DATASET_INVALID),
        ({"outcome": "failed", "error": UNREACHABLE, "may_retry": True}, PENDING, Reason.TEACHER_UNREACHABLE),
        (
            {"outcome": "failed", "error": UNREACHABLE, "may_retry": True, "state": STOPPING},
            FAILED,
            Reason.TEACHER_UNREACHABLE,
        ),
        ({"exit": Exit(code=1)}, FAILED, Reason.PROCESS_DIED),
        ({"exit": Exit(code=None)}, FAILED, Reason.PROCESS_DIED),
        ({"exit": Exit(code=EXIT_DISK_FULL), "may_retry": True}, FAILED, Reason.DISK_FULL),
        ({"exit": KILLED}, FAILED, Reason.PROCESS_DIED),
        ({"exit": KILLED, "may_retry": True}, PENDING, Reason.PROCESS_DIED),
        ({"exit": KILLED, "killed_for_memory": True, "may_retry": True}, FAILED, Reason.OUT_OF_MEMORY),
        (
            {"exit": KILLED, "overflowed": "metrics", "may_halve": True, "may_retry": True},
            FAILED,
            Reason.QUOTA,
        ),
        ({"exit": KILLED, "may_halve": True}, PENDING, Reason.PROCESS_DIED),
        ({"exit": KILLED, "may_halve": True, "state": STOPPING}, FAILED, Reason.PROCESS_DIED),
        ({"exit": KILLED, "killed_for_memory": True, "may_halve": True}, PENDING, Reason.OUT_OF_MEMORY),
        ({"outcome": "failed", "error": NO_MEMORY}, FAILED, Reason.OUT_OF_MEMORY),
        ({"outcome": "failed", "error": NO_MEMORY, "may_retry": True}, FAILED, Reason.OUT_OF_MEMORY),
        ({"outcome": "failed", "error": NO_MEMORY, "may_halve": True}, PENDING, Reason.OUT_OF_MEMORY),
        ({"outcome": "failed", "error": INVALID, "may_halve": True}, FAILED, Reason.DATASET_INVALID),
        ({"exit": Exit(code=1), "may_halve": True}, FAILED, Reason.PROCESS_DIED),
        ({"exit": KILLED, "only_waited": True}, PENDING, Reason.PROCESS_DIED),
        ({"exit": KILLED, "only_waited": True, "killed_for_memory": True}, PENDING, Reason.PROCESS_DIED),
        ({"exit": KILLED, "only_waited": True, "state": STOPPING}, FAILED, Reason.PROCESS_DIED),
        ({"exit": KILLED, "only_waited": True, "killed_for_silence": True}, FAILED, Reason.PROCESS_DIED),
        ({"exit": KILLED, "only_waited": True, "overflowed": "log"}, FAILED, Reason.QUOTA),
        ({"exit": Exit(code=1), "only_waited": True}, FAILED, Reason.PROCESS_DIED),
        ({"outcome": "failed", "error": INVALID, "only_waited": True}, FAILED, Reason.DATASET_INVALID),
        ({"exit": KILLED, "killed_for_stop": True, "state": STOPPING}, STOPPED, Reason.PROCESS_DIED),
        ({"exit": KILLED, "state": STOPPING}, FAILED, Reason.PROCESS_DIED),
    ],
)
def test_every_way_to_end(seen: dict[str, Any], state: State, reason: Reason | None) -> None:
    assert ended(**seen)[:2] == (state, reason)


@pytest.mark.parametrize("code", [Exit(code=137), KILLED])
@pytest.mark.faults(row=8)
def test_exit_137_comes_with_advice(code: Exit) -> None:
    assert "optimizer.micro_batch_size" in ended(exit=code)[2]


def test_an_unreported_death_shows_the_last_log_lines() -> None:
    assert ended(exit=Exit(code=1), log_tail="ImportError: no torch")[2].endswith(
        "Last log lines: ImportError: no torch"
    )


@pytest.mark.parametrize(
    "seen",
    [
        {"exit": KILLED, "killed_for_silence": True},
        {"exit": KILLED, "killed_for_stop": True, "state": STOPPING},
        {"exit": KILLED, "killed_for_memory": True},
        {"exit": KILLED},
        {"exit": Exit(code=143, signal=signal.SIGTERM)},
        {"exit": Exit(code=None)},
        {"exit": Exit(code=1)},
    ],
)
def test_a_death_says_where_a_resume_begins(seen: dict[str, Any]) -> None:
    lost = ended(**seen)[2]
    assert "`run resume` begins again at the first step, because the run has no checkpoint yet." in lost
    assert "last checkpoint" not in lost
    assert "`run resume` continues from checkpoints/40." in ended(**seen, resumes_from="checkpoints/40")[2]


def test_the_next_state_is_always_a_transition() -> None:
    for state in LIVE:
        for outcome in ("completed", "stopped", "failed", None):
            for killed, retry in ((False, False), (False, True), (state == STOPPING, False)):
                following = ended(
                    state=state, outcome=outcome, error=UNREACHABLE, killed_for_stop=killed, may_retry=retry
                )[0]
                # A run that completes while STARTING passes through RUNNING.
                origin = RUNNING if (state, following) == (Run.STATE_STARTING, COMPLETED) else state
                assert may_become(origin, following), (state, outcome, following)
