"""State machine of a run as a table; every change of state in the store uses it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import Run

State: TypeAlias = "Run.State.ValueType"

PENDING = Run.STATE_PENDING
STARTING = Run.STATE_STARTING
RUNNING = Run.STATE_RUNNING
STOPPING = Run.STATE_STOPPING
STOPPED = Run.STATE_STOPPED
COMPLETED = Run.STATE_COMPLETED
FAILED = Run.STATE_FAILED

TRANSITIONS: Mapping[State, Mapping[State, str]] = {
    PENDING: {STARTING: "launch", STOPPED: "stop", FAILED: "fail"},
    STARTING: {RUNNING: "start", STOPPING: "stop", FAILED: "fail", PENDING: "retry"},
    RUNNING: {STOPPING: "stop", COMPLETED: "complete", FAILED: "fail", PENDING: "retry"},
    STOPPING: {STOPPED: "end", COMPLETED: "complete", FAILED: "fail"},
    STOPPED: {PENDING: "resume"},
    FAILED: {PENDING: "resume"},
    COMPLETED: {},
}
"""Allowed next states of each state, with the name of the transition."""

LIVE = frozenset({STARTING, RUNNING, STOPPING})
"""States with a live process."""
ENDED = frozenset({STOPPED, COMPLETED, FAILED})
"""Final states, left only by a request."""
RESUMABLE = frozenset(state for state, following in TRANSITIONS.items() if "resume" in following.values())
"""Final states that a request leaves."""


def may_become(state: State, following: State) -> bool:
    """True if `state` may change to `following`."""
    return following in TRANSITIONS[state]


def state_error(run_id: str, state: State, verb: str, allowed: frozenset[State]) -> StillhouseError:
    """The error for `verb` on a run whose state is not in `allowed`."""
    names = ", ".join(state_name(each) for each in sorted(allowed))
    return StillhouseError(
        Reason.RUN_STATE,
        f"Run {run_id} is {state_name(state)}; {verb} needs one of {names}.",
        metadata={"state": state_name(state), "allowed_states": names, "run": run_id},
        resource=f"runs/{run_id}",
    )


def state_name(state: State) -> str:
    """Short name of the state, such as "RUNNING"."""
    return Run.State.Name(state).removeprefix("STATE_")
