"""The states of a run and the arrows between them, as data; every change of state in the store goes through here."""

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
"""From each state, the states that can follow, and the name of the arrow."""

LIVE = frozenset({STARTING, RUNNING, STOPPING})
"""States in which a process works on the run."""
ENDED = frozenset({STOPPED, COMPLETED, FAILED})
"""States in which nothing more happens by itself."""


def may_become(state: State, following: State) -> bool:
    """Whether there is an arrow from `state` to `following`."""
    return following in TRANSITIONS[state]


def state_error(run_id: str, state: State, verb: str, allowed: frozenset[State]) -> StillhouseError:
    """The error for asking `verb` of a run whose state is not in `allowed`."""
    names = ", ".join(state_name(each) for each in sorted(allowed))
    return StillhouseError(
        Reason.RUN_STATE,
        f"Run {run_id} is {state_name(state)}; {verb} needs one of {names}.",
        metadata={"state": state_name(state), "allowed_states": names, "run": run_id},
        resource=f"runs/{run_id}",
    )


def state_name(state: State) -> str:
    """The state as people write it, such as "RUNNING"."""
    return Run.State.Name(state).removeprefix("STATE_")
