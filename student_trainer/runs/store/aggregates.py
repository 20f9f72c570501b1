"""Aggregates over all runs, for metrics; read within a transaction of the store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from stillhouse.protos.stillhouse.v1.run_pb2 import MetricPoint, Run
from stillhouse.student_trainer.runs.store.queries import now_us
from stillhouse.student_trainer.runs.store.run_state import LIVE, PENDING, TRANSITIONS, State
from stillhouse.student_trainer.runs.store.schema import attempts, events, runs

LATEST_POINTS = 3
"""Number of latest points per run: evaluations are points of their own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Totals:
    """Sums over all runs."""

    states: Mapping[State, int]
    """Runs in each state."""
    oldest_queued_s: float
    """Age of the oldest queued run; 0 if there is none."""
    waiting_for_teacher: int
    """Live runs that wait for a teacher."""
    tokens_per_second: float
    """Sum over live runs."""
    trained_tokens: int
    """Completion tokens trained on."""
    attempts: int
    """Processes started."""
    retries: int
    """Attempts after the first of their run."""
    live: Mapping[str, Mapping[str, float]]
    """Run id to its latest metrics, of each live run."""


def read_totals(db: Connection) -> Totals:
    """Reads the current sums."""
    counted = db.execute(select(runs.c.state, func.count().label("number")).group_by(runs.c.state)).all()
    oldest = db.execute(select(func.min(runs.c.create_us)).where(runs.c.state == PENDING)).scalar_one()
    live = runs.c.state.in_(sorted(LIVE))
    waiting = select(func.count()).where(live, runs.c.condition == Run.CONDITION_WAITING_FOR_TEACHER)
    speed = select(func.coalesce(func.sum(runs.c.tokens_per_second), 0.0)).where(live)
    trained = select(func.coalesce(func.sum(runs.c.trained_tokens), 0))
    retries = select(func.count()).where(attempts.c.number > 1)
    return Totals(
        states=dict.fromkeys(TRANSITIONS, 0) | {row.state: row.number for row in counted},
        oldest_queued_s=0.0 if oldest is None else max(0.0, (now_us() - oldest) / 1e6),
        waiting_for_teacher=int(db.execute(waiting).scalar_one()),
        tokens_per_second=float(db.execute(speed).scalar_one()),
        trained_tokens=int(db.execute(trained).scalar_one()),
        attempts=int(db.execute(select(func.count()).select_from(attempts)).scalar_one()),
        retries=int(db.execute(retries).scalar_one()),
        live={row: _latest(db, row) for row in db.execute(select(runs.c.id).where(live)).scalars().all()},
    )


def _latest(db: Connection, run_id: str) -> dict[str, float]:
    """Latest value of each frequent metric of a run."""
    query = (
        select(events.c.payload)
        .where(events.c.run_id == run_id, events.c.kind == "metrics")
        .order_by(events.c.sequence.desc())
        .limit(LATEST_POINTS)
    )
    values: dict[str, float] = {}
    for payload in reversed(db.execute(query).scalars().all()):
        values |= MetricPoint.FromString(payload).values
    return values
