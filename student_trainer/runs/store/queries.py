"""Rows of the store as messages and back, within a transaction that the store opened."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any, cast

from google.protobuf.message import Message
from google.rpc.status_pb2 import Status
from sqlalchemy import ColumnElement, Connection, RowMapping, Select, func, insert, select, update

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import (
    Attempt,
    MetricPoint,
    Run,
    RunChange,
    RunSpec,
    WatchRunResponse,
)
from stillhouse.student_trainer.runs.store.run_filter import RunFilter
from stillhouse.student_trainer.runs.store.run_state import ENDED, PENDING, State, may_become, state_name
from stillhouse.student_trainer.runs.store.schema import attempts, changes, events, requests, runs

MOST_CHANGES = 500
"""Changes that a run's history has."""
MOST_SEARCHED = 2500
"""Runs that one page of a search by labels or text looks through."""
SEARCHED_AT_ONCE = 250
STEP_METRICS = frozenset({"train/loss", "cache/sequences"})
"""A point with one of these metrics is a step that the attempt took; others are evaluations."""


def now_us() -> int:
    """Microseconds since the epoch."""
    return time.time_ns() // 1000


def to_bytes(message: Message) -> bytes:
    """Serializes deterministically: equal messages give equal bytes within a version."""
    return message.SerializeToString(deterministic=True)


def spec_sha256(spec: RunSpec) -> str:
    """Digest that distinguishes specs with the same request id."""
    return hashlib.sha256(to_bytes(spec)).hexdigest()


def run_row(db: Connection, run_id: str) -> RowMapping:
    """The run's row. Raises StillhouseError(RUN_NOT_FOUND)."""
    row = db.execute(select(runs).where(runs.c.id == run_id)).mappings().one_or_none()
    if row is None:
        raise StillhouseError(
            Reason.RUN_NOT_FOUND,
            f"There is no run {run_id}; `stillhouse run list` shows all.",
            resource=f"runs/{run_id}",
        )
    return row


def run_of_request(db: Connection, request_id: str, spec: RunSpec) -> Run | None:
    """The run created with `request_id`. Raises StillhouseError(REQUEST_CONFLICT) if it has another spec."""
    row = db.execute(select(requests).where(requests.c.id == request_id)).mappings().one_or_none()
    if row is None:
        return None
    if row["spec_sha256"] != spec_sha256(spec):
        raise StillhouseError(
            Reason.REQUEST_CONFLICT,
            f"request_id {request_id} created run {row['run_id']} from another spec; use a new request_id for each spec.",
            resource=f"runs/{row['run_id']}",
        )
    return to_run(db, run_row(db, row["run_id"]))


def check_quota(db: Connection, owner: str, max_queued: int | None) -> None:
    """Checks that `owner` may queue one more run. Raises StillhouseError(QUOTA)."""
    if max_queued is None:
        return
    theirs = (runs.c.owner == owner) & (runs.c.state == PENDING)
    queued = int(db.execute(select(func.count()).where(theirs)).scalar_one())
    if queued >= max_queued:
        raise StillhouseError(
            Reason.QUOTA,
            f"{queued} runs of {owner or 'callers without a token'} are queued, and this service allows {max_queued} per "
            "client. Wait until some have started, stop some, or start the service with a larger --max-queued-runs.",
            metadata={"queued": str(queued), "limit": str(max_queued)},
        )


def next_queue_number(db: Connection) -> int:
    """Queue number after all others."""
    return int(db.execute(select(func.coalesce(func.max(runs.c.queue_number), 0))).scalar_one()) + 1


def last_attempt(db: Connection, run_id: str) -> int:
    """Number of the run's newest attempt; 0 if there is none."""
    query = select(func.coalesce(func.max(attempts.c.number), 0)).where(attempts.c.run_id == run_id)
    return int(db.execute(query).scalar_one())


def set_state(db: Connection, row: RowMapping, following: State, values: dict[str, Any]) -> None:
    """Changes the state to `following`, sets `values`, and appends an event."""
    assert may_become(row["state"], following), f"{state_name(row['state'])} -> {state_name(following)}"
    if following in ENDED:
        values = {"end_us": now_us(), **values}
    moved = db.execute(
        update(runs)
        .where(runs.c.id == row["id"], runs.c.state == row["state"])
        .values(state=following, **values)
    )
    assert moved.rowcount == 1
    append_run_event(db, row["id"])


def append_run_event(db: Connection, run_id: str) -> None:
    """Appends the current run to its history, without its specs, which never change."""
    row = run_row(db, run_id)
    sequence = int(row["last_sequence"]) + 1
    payload = to_bytes(to_run(db, row, with_specs=False))
    db.execute(insert(events).values(run_id=run_id, sequence=sequence, kind="run", payload=payload))
    db.execute(
        insert(changes).values(
            run_id=run_id,
            sequence=sequence,
            time_us=now_us(),
            state=row["state"],
            condition=row["condition"],
            step=row["step"],
            checkpoint_step=row["latest_checkpoint"] or 0,
        )
    )
    db.execute(update(runs).where(runs.c.id == run_id).values(last_sequence=sequence))


def append_points(db: Connection, run_id: str, after: int, points: Sequence[tuple[int, MetricPoint]]) -> int:
    """Appends points, each with its attempt, to the history, whose last event is `after`, and extends the attempts' ranges
    of steps; returns the sequence of the last point."""
    if not points:
        return after
    rows = [
        {
            "run_id": run_id,
            "sequence": sequence,
            "kind": "metrics",
            "step": each.step,
            "payload": to_bytes(each),
        }
        for sequence, (_, each) in enumerate(points, after + 1)
    ]
    db.execute(insert(events), rows)
    for number in dict.fromkeys(number for number, _ in points):
        _count_steps(db, run_id, number, [each for of, each in points if of == number])
    return after + len(rows)


def _count_steps(db: Connection, run_id: str, number: int, points: Sequence[MetricPoint]) -> None:
    """Extends the range of steps of an attempt by its points, in order."""
    steps = [each.step for each in points if not STEP_METRICS.isdisjoint(each.values)]
    if not steps:
        return
    this = (attempts.c.run_id == run_id) & (attempts.c.number == number)
    db.execute(update(attempts).where(this, attempts.c.first_step == 0).values(first_step=steps[0]))
    db.execute(update(attempts).where(this).values(last_step=steps[-1]))


def read_changes(db: Connection, run_id: str) -> list[RunChange]:
    """The newest MOST_CHANGES changes of a run, oldest first."""
    query = (
        select(changes)
        .where(changes.c.run_id == run_id)
        .order_by(changes.c.sequence.desc())
        .limit(MOST_CHANGES)
    )
    return [_to_change(each) for each in reversed(db.execute(query).mappings().all())]


def newest(wanted: RunFilter, before: int | None, *columns: ColumnElement[Any]) -> Select[Any]:
    """Selects runs in the states of `wanted`, newest first, older than number `before`; all columns unless some are given."""
    query = (select(*columns) if columns else select(runs)).order_by(runs.c.number.desc())
    if wanted.states:
        query = query.where(runs.c.state.in_(wanted.states))
    return query if before is None else query.where(runs.c.number < before)


def search(db: Connection, wanted: RunFilter, before: int | None, limit: int) -> tuple[list[int], int | None]:
    """Numbers of at most `limit` runs that `wanted` takes, newest first, older than number `before`; and the number to
    continue from if the search has ended after MOST_SEARCHED runs."""
    found: list[int] = []
    for _ in range(MOST_SEARCHED // SEARCHED_AT_ONCE):
        query = newest(wanted, before, runs.c.number, runs.c.id, runs.c.effective_spec)
        rows = db.execute(query.limit(SEARCHED_AT_ONCE)).all()
        for number, run_id, spec in rows:
            if wanted.takes(run_id, RunSpec.FromString(spec)):
                found.append(number)
                if len(found) == limit:
                    return found, None
        if len(rows) < SEARCHED_AT_ONCE:
            return found, None
        before = rows[-1][0]
    return found, before


def to_run(db: Connection, row: RowMapping, *, with_specs: bool = True) -> Run:
    """The run message from a row and its attempts."""
    run = _to_run(row, with_specs=with_specs)
    if row["state"] == PENDING:
        ahead = select(func.count()).where(runs.c.state == PENDING, runs.c.queue_number < row["queue_number"])
        run.queue_position = db.execute(ahead).scalar_one()
    query = select(attempts).where(attempts.c.run_id == row["id"]).order_by(attempts.c.number)
    run.attempts.extend(_to_attempt(each) for each in db.execute(query).mappings())
    return run


def to_runs(db: Connection, found: Sequence[RowMapping]) -> list[Run]:
    """The run messages of many rows, by two queries in all."""
    made = {row["id"]: _to_run(row, with_specs=True) for row in found}
    if any(row["state"] == PENDING for row in found):
        queued = select(runs.c.id).where(runs.c.state == PENDING).order_by(runs.c.queue_number)
        for position, run_id in enumerate(db.execute(queued).scalars()):
            if run_id in made:
                made[run_id].queue_position = position
    query = select(attempts).where(attempts.c.run_id.in_(list(made))).order_by(attempts.c.number)
    for each in db.execute(query).mappings():
        made[each["run_id"]].attempts.append(_to_attempt(each))
    return list(made.values())


def _to_run(row: RowMapping, *, with_specs: bool) -> Run:
    """The run message from its row alone."""
    run = Run(
        name=f"runs/{row['id']}",
        state=cast("State", row["state"]),
        condition=cast("Run.Condition.ValueType", row["condition"]),
        created_by_version=row["created_by_version"],
        datasets=row["datasets"].split(),
    )
    run.progress.step = row["step"]
    run.progress.total_steps = row["total_steps"]
    run.progress.trained_tokens = row["trained_tokens"]
    run.progress.tokens_per_second = row["tokens_per_second"]
    if with_specs:
        run.spec.ParseFromString(row["spec"])
        run.effective_spec.ParseFromString(row["effective_spec"])
        if row["loss_curve"] is not None:
            run.progress.loss.ParseFromString(row["loss_curve"])
    if row["error"] is not None:
        run.error.ParseFromString(row["error"])
    if row["latest_checkpoint"] is not None:
        run.latest_checkpoint = f"{run.name}/checkpoints/{row['latest_checkpoint']}"
    _set_times(run, row, ("create", "start", "end"))
    return run


def _to_attempt(row: RowMapping) -> Attempt:
    attempt = Attempt(
        number=row["number"],
        first_step=row["first_step"],
        last_step=row["last_step"],
        exit_code=row["exit_code"],
        signal=row["signal"],
    )
    if row["error"] is not None:
        attempt.error.CopyFrom(Status.FromString(row["error"]))
    _set_times(attempt, row, ("start", "end"))
    return attempt


def _to_change(row: RowMapping) -> RunChange:
    change = RunChange(
        sequence=row["sequence"],
        state=cast("State", row["state"]),
        condition=cast("Run.Condition.ValueType", row["condition"]),
        step=row["step"],
        checkpoint_step=row["checkpoint_step"],
    )
    change.time.FromMicroseconds(row["time_us"])
    return change


def _set_times(message: Any, row: RowMapping, names: tuple[str, ...]) -> None:
    for name in names:
        if row[f"{name}_us"] is not None:
            getattr(message, f"{name}_time").FromMicroseconds(row[f"{name}_us"])


def to_response(row: RowMapping) -> WatchRunResponse:
    """An event as WatchRun sends it."""
    response = WatchRunResponse(sequence=row["sequence"])
    if row["kind"] == "run":
        response.run.ParseFromString(row["payload"])
    else:
        response.metrics.ParseFromString(row["payload"])
    return response
