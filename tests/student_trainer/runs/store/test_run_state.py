"""Run state machine, over all pairs."""

from __future__ import annotations

import itertools

import pytest

from stillhouse.protos.errors import Reason
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.student_trainer.runs.store import run_state
from stillhouse.student_trainer.runs.store.run_state import (
    ENDED,
    LIVE,
    PENDING,
    TRANSITIONS,
    State,
    may_become,
)

STATES = [each for each in Run.State.values() if each != Run.STATE_UNSPECIFIED]
WANTED = {
    "PENDING": {"STARTING", "STOPPED", "FAILED"},
    "STARTING": {"RUNNING", "STOPPING", "FAILED", "PENDING"},
    "RUNNING": {"STOPPING", "COMPLETED", "FAILED", "PENDING"},
    "STOPPING": {"STOPPED", "COMPLETED", "FAILED"},
    "STOPPED": {"PENDING"},
    "FAILED": {"PENDING"},
    "COMPLETED": set(),
}


@pytest.mark.parametrize(("one", "other"), list(itertools.product(STATES, STATES)))
def test_every_pair(one: State, other: State) -> None:
    assert may_become(one, other) == (run_state.state_name(other) in WANTED[run_state.state_name(one)])


def test_every_state_is_pending_live_or_ended() -> None:
    assert {PENDING} | LIVE | ENDED == set(STATES) == set(TRANSITIONS)
    assert not LIVE & ENDED


def test_every_state_can_be_reached_and_every_live_one_left() -> None:
    reached, frontier = {PENDING}, [PENDING]
    while frontier:
        following = set(TRANSITIONS[frontier.pop()]) - reached
        reached |= following
        frontier += following
    assert reached == set(STATES)
    assert all(TRANSITIONS[each] for each in (PENDING, *LIVE))


def test_a_refusal_names_state_and_allowed_states() -> None:
    error = run_state.state_error(
        "abcdefgh2345", run_state.COMPLETED, "resume", frozenset({run_state.STOPPED, run_state.FAILED})
    )
    assert error.reason is Reason.RUN_STATE
    assert str(error) == "Run abcdefgh2345 is COMPLETED; resume needs one of STOPPED, FAILED."
    assert error.metadata == {
        "state": "COMPLETED",
        "allowed_states": "STOPPED, FAILED",
        "run": "abcdefgh2345",
    }
