"""History of a run service's runs after a soak, and all defects in it: lost, repeated, illegal or unexplained."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stillhouse.protos.stillhouse.v1.run_pb2 import Run, WatchRunResponse
from stillhouse.student_trainer.runs.store.run_state import ENDED, PENDING, may_become, state_name
from stillhouse.student_trainer.runs.store.store import Store

WANTED = {
    "completes": Run.STATE_COMPLETED,
    "fails": Run.STATE_FAILED,
    "stopped in the queue": Run.STATE_STOPPED,
    "stopped while it trains": Run.STATE_STOPPED,
}
"""Expected final state of each fate."""
AT_ONCE = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class RunHistory:
    """One run as recorded by the store and its directory."""

    run: Run
    events: tuple[WatchRunResponse, ...]
    """Complete event history."""
    journal: tuple[tuple[int, int], ...]
    """(attempt, step) of each line of its metrics.jsonl."""
    outcomes: tuple[str, ...]
    """Outcomes that its processes recorded in events.jsonl."""


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """All runs of a service by id."""

    runs: Mapping[str, RunHistory]

    @classmethod
    def read(cls, data_dir: Path, database: str | None) -> History:
        """Reads the data directory, and the database if the store is elsewhere; no service may be running."""
        store = Store.open(database or data_dir / "stillhouse.db")
        try:
            found = {
                run_id: _read(store, data_dir / "runs" / run_id, run_id) for run_id in sorted(store.ids())
            }
        finally:
            store.close()
        return cls(runs=found)

    @property
    def num_metrics(self) -> int:
        """Metric points in the store."""
        return sum(event.HasField("metrics") for each in self.runs.values() for event in each.events)

    @property
    def most_at_once(self) -> int:
        """Largest number of concurrent attempts in the store."""
        changes = []
        for each in self.runs.values():
            for attempt in each.run.attempts:
                changes.append((attempt.start_time.ToMicroseconds(), 1))
                changes.append((attempt.end_time.ToMicroseconds(), -1))
        running = most = 0
        for _, change in sorted(changes):  # at equal times ends come first
            running += change
            most = max(most, running)
        return most


def check(
    history: History, fates: Mapping[str, str], submitted: Mapping[str, str], *, steps: int
) -> Iterator[str]:
    """Yields all defects. `fates` and `submitted` are by request id; `steps` is the length of a completed run."""
    if Counter(submitted.values()) != Counter(history.runs.keys()):
        yield f"{len(submitted)} requests made {len(history.runs)} runs"
    for request_id, run_id in submitted.items():
        if run_id not in history.runs:
            yield f"run {run_id} is gone"
            continue
        for fault in _check_run(history.runs[run_id], fates[request_id], steps):
            yield f"run {run_id} ({fates[request_id]}): {fault}"


def _check_run(each: RunHistory, fate: str, steps: int) -> Iterator[str]:
    run = each.run
    if run.state != WANTED[fate]:
        yield f"ended {state_name(run.state)}: {run.error.message}"
    if [event.sequence for event in each.events] != list(range(1, len(each.events) + 1)):
        yield "its history has gaps"
    yield from _check_states(each)
    if any(not attempt.HasField("end_time") for attempt in run.attempts):
        yield "an attempt has no end"
    stored = [
        (event.metrics.attempt, event.metrics.step) for event in each.events if event.HasField("metrics")
    ]
    if Counter(stored) != Counter(each.journal):
        yield f"its journal has {len(each.journal)} metric points and the store {len(stored)}"
    if fate == "completes":
        losses = [event.metrics.step for event in each.events if "train/loss" in event.metrics.values]
        if losses != list(range(1, steps + 1)) or run.progress.step != steps:
            yield f"it took the steps {losses}"
        if len(run.attempts) != 1 or each.outcomes != ("completed",):
            yield f"it had {len(run.attempts)} attempts, which ended {each.outcomes}"
    if fate == "fails" and (each.outcomes != ("failed",) or not run.error.message):
        yield f"its processes ended {each.outcomes}"


def _check_states(each: RunHistory) -> Iterator[str]:
    """Checks that a run follows the state machine and ends once."""
    told = [event.run.state for event in each.events if event.HasField("run")]
    states = [state for index, state in enumerate(told) if index == 0 or state != told[index - 1]]
    if states[:1] != [PENDING]:
        yield "its history does not begin in the queue"
    for before, after in itertools.pairwise(states):
        if not may_become(before, after):
            yield f"it went from {state_name(before)} to {state_name(after)}"
    if sum(state in ENDED for state in states) != 1 or states[-1] != each.run.state:
        yield f"its states were {[state_name(state) for state in states]}"


def _read(store: Store, path: Path, run_id: str) -> RunHistory:
    lines = [
        json.loads(line)
        for name in ("metrics.jsonl", "events.jsonl")
        if (path / name).exists()
        for line in (path / name).read_text().splitlines()
    ]
    return RunHistory(
        run=store.get(run_id),
        events=tuple(store.events(run_id, after=0, limit=AT_ONCE)),
        journal=tuple((line["attempt"], line["step"]) for line in lines if "values" in line),
        outcomes=tuple(
            line["kind"] for line in lines if line.get("kind") in ("completed", "stopped", "failed")
        ),
    )
