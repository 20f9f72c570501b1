"""Store of runs: every change of a run is one transaction and one event in its history.

Methods block; the service calls them through one DatabaseThread. Any of them raises StillhouseError(DATABASE_UNREACHABLE)
while a database server does not respond.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from google.rpc.status_pb2 import Status
from sqlalchemy import Engine, RowMapping, delete, insert, select, update

from stillhouse.protos.stillhouse.v1.run_pb2 import Run, RunSpec, WatchRunResponse
from stillhouse.student_trainer.runs.store import aggregates, loss_curve, metric_blocks, queries, run_state
from stillhouse.student_trainer.runs.store.aggregates import Totals
from stillhouse.student_trainer.runs.store.database import open_database, transaction
from stillhouse.student_trainer.runs.store.datasets import DatasetStore, StoredDataset, require_files
from stillhouse.student_trainer.runs.store.journal_ingest import JournalBatch
from stillhouse.student_trainer.runs.store.metric_blocks import Stored
from stillhouse.student_trainer.runs.store.queries import now_us, to_bytes
from stillhouse.student_trainer.runs.store.run_filter import RunFilter
from stillhouse.student_trainer.runs.store.run_state import ENDED, LIVE, PENDING, RUNNING, STARTING, State
from stillhouse.student_trainer.runs.store.schema import attempts, events, requests, runs

MAX_PAGE_BYTES = 8 * 2**20
"""Limit on a page of runs; a single run may exceed it."""


class Store:
    """Runs, their attempts and events, and request ids; and the datasets beside them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.datasets = DatasetStore(engine)

    @classmethod
    def open(cls, place: Path | str) -> Self:
        """Opens the store in the database file or at the URL `place`, created or migrated if needed."""
        return cls(open_database(place))

    def close(self) -> None:
        """Closes the database."""
        self._engine.dispose()

    def create(
        self,
        run_id: str,
        spec: RunSpec,
        effective: RunSpec,
        *,
        request_id: str,
        version: str,
        owner: str = "",
        max_queued: int | None = None,
        datasets: Sequence[StoredDataset] = (),
    ) -> tuple[Run, bool]:
        """Creates a PENDING run at the end of the queue, and True; or the earlier run of `request_id`, and False.

        Raises:
            StillhouseError: REQUEST_CONFLICT if `request_id` was used for another spec, QUOTA if `owner` has
                `max_queued` runs in the queue, DATASET_NOT_FOUND if one of `datasets` was deleted.
        """
        with transaction(self._engine) as db:
            earlier = queries.run_of_request(db, request_id, spec)
            if earlier is not None:
                return earlier, False
            queries.check_quota(db, owner, max_queued)
            require_files(db, datasets)
            values = {
                "id": run_id,
                "spec": to_bytes(spec),
                "effective_spec": to_bytes(effective),
                "created_by_version": version,
                "state": PENDING,
                "queue_number": queries.next_queue_number(db),
                "create_us": now_us(),
                "owner": owner,
                "datasets": " ".join(each.name for each in datasets),
            }
            db.execute(insert(runs).values(**values))
            if request_id:
                db.execute(
                    insert(requests).values(
                        id=request_id, spec_sha256=queries.spec_sha256(spec), run_id=run_id
                    )
                )
            queries.append_run_event(db, run_id)
            return queries.to_run(db, queries.run_row(db, run_id)), True

    def find_request(self, request_id: str, spec: RunSpec) -> Run | None:
        """The run created with `request_id`, if any. Raises as `create` does."""
        with transaction(self._engine) as db:
            return queries.run_of_request(db, request_id, spec)

    def get(self, run_id: str, *, with_history: bool = False) -> Run:
        """The run with both specs, and its history if asked. Raises StillhouseError(RUN_NOT_FOUND)."""
        with transaction(self._engine) as db:
            run = queries.to_run(db, queries.run_row(db, run_id))
            if with_history:
                run.history.extend(queries.read_changes(db, run_id))
            return run

    def get_with_sequence(self, run_id: str) -> tuple[Run, int]:
        """The run, and the sequence of its newest event."""
        with transaction(self._engine) as db:
            row = queries.run_row(db, run_id)
            return queries.to_run(db, row), int(row["last_sequence"])

    def page(self, wanted: RunFilter, *, before: int | None, limit: int) -> tuple[list[Run], int | None]:
        """At most `limit` runs and about MAX_PAGE_BYTES, newest first, older than number `before`; and the number to
        continue from, if there may be more. A search by labels or text ends after queries.MOST_SEARCHED runs."""
        with transaction(self._engine) as db:
            if not wanted.searches:
                found = db.execute(queries.newest(wanted, before).limit(limit + 1)).mappings().all()
                following = None
            else:
                numbers, following = queries.search(db, wanted, before, limit + 1)
                query = select(runs).where(runs.c.number.in_(numbers)).order_by(runs.c.number.desc())
                found = db.execute(query).mappings().all()
            shown = queries.to_runs(db, _first(found[:limit], MAX_PAGE_BYTES))
        return shown, int(found[len(shown) - 1]["number"]) if len(found) > len(shown) else following

    def queue(self) -> list[Run]:
        """PENDING runs in queue order."""
        return self._in_states([PENDING])

    def live(self) -> list[Run]:
        """Runs in a state with a live process."""
        return self._in_states(sorted(LIVE))

    def ids(self) -> frozenset[str]:
        """Ids of all runs."""
        with transaction(self._engine) as db:
            return frozenset(db.execute(select(runs.c.id)).scalars())

    def refuse(self, run_id: str, error: Status) -> None:
        """Makes a queued run FAILED, since it can never start. Raises StillhouseError(RUN_STATE) if it is not PENDING."""
        with transaction(self._engine) as db:
            row = queries.run_row(db, run_id)
            if row["state"] != PENDING:
                raise run_state.state_error(run_id, row["state"], "fail", frozenset({PENDING}))
            values = {"condition": Run.CONDITION_UNSPECIFIED, "error": to_bytes(error)}
            queries.set_state(db, row, run_state.FAILED, values)

    def resume(
        self,
        run_id: str,
        change: Callable[[RunSpec], RunSpec] | None = None,
        *,
        max_queued: int | None = None,
        whole_micro_batch: bool = False,
    ) -> Run:
        """Queues a STOPPED or FAILED run again, with `change` applied to its effective spec; returns the run.

        `whole_micro_batch` undoes a halving. Nothing changes if it raises StillhouseError: RUN_STATE for another state, QUOTA
        if its owner has `max_queued` runs in the queue, or what `change` raises.
        """
        with transaction(self._engine) as db:
            row = queries.run_row(db, run_id)
            if row["state"] not in run_state.RESUMABLE:
                raise run_state.state_error(run_id, row["state"], "resume", run_state.RESUMABLE)
            queries.check_quota(db, row["owner"], max_queued)
            values: dict[str, Any] = {
                "condition": Run.CONDITION_UNSPECIFIED,
                "queue_number": queries.next_queue_number(db),
                "end_us": None,
                "error": None,
                "step": row["latest_checkpoint"] or 0,  # the next attempt's first step
                "asked_attempt": queries.last_attempt(db, run_id),
            }
            if change is not None:
                values["effective_spec"] = to_bytes(change(RunSpec.FromString(row["effective_spec"])))
            if whole_micro_batch:
                values["halved"] = False
            queries.set_state(db, row, PENDING, values)
            return queries.to_run(db, queries.run_row(db, run_id))

    def set_condition(
        self, run_id: str, condition: Run.Condition.ValueType, *, instead_of: Run.Condition.ValueType
    ) -> None:
        """Sets the condition of a live run, if it is `instead_of` now."""
        this = (runs.c.id == run_id) & (runs.c.condition == instead_of)
        with transaction(self._engine) as db:
            if db.execute(update(runs).where(this).values(condition=condition)).rowcount:
                queries.append_run_event(db, run_id)

    def stop(self, run_id: str) -> Run:
        """Requests a stop: a queued run becomes STOPPED, a live one STOPPING, others stay. Returns the run.

        Raises:
            StillhouseError: RUN_STATE if it is COMPLETED or FAILED.
        """
        with transaction(self._engine) as db:
            row = queries.run_row(db, run_id)
            if row["state"] == PENDING:
                queries.set_state(db, row, run_state.STOPPED, {"condition": Run.CONDITION_UNSPECIFIED})
            elif row["state"] in (STARTING, RUNNING):
                queries.set_state(db, row, run_state.STOPPING, {})
            elif row["state"] not in (run_state.STOPPING, run_state.STOPPED):
                allowed = frozenset({PENDING, STARTING, RUNNING, run_state.STOPPING, run_state.STOPPED})
                raise run_state.state_error(run_id, row["state"], "stop", allowed)
            return queries.to_run(db, queries.run_row(db, run_id))

    def begin_attempt(self, run_id: str, devices: Sequence[int]) -> int:
        """Adds an attempt and makes the run STARTING; returns the attempt's number.

        Raises:
            StillhouseError: RUN_STATE if the run is not PENDING.
        """
        with transaction(self._engine) as db:
            row = queries.run_row(db, run_id)
            if row["state"] != PENDING:
                raise run_state.state_error(run_id, row["state"], "launch", frozenset({PENDING}))
            number = queries.last_attempt(db, run_id) + 1
            now = now_us()
            db.execute(
                insert(attempts).values(
                    run_id=run_id, number=number, start_us=now, devices=",".join(map(str, devices))
                )
            )
            queries.set_state(db, row, STARTING, {"start_us": row["start_us"] or now})
            return number

    def end_attempt(
        self,
        run_id: str,
        number: int,
        following: State,
        *,
        exit_code: int,
        signal: int,
        error: Status | None,
        halve: bool = False,
    ) -> Run:
        """Ends an attempt and makes the run `following`; with `halve` it continues with half its micro-batch.

        `error` is the attempt's, and the run's if it FAILED. A PENDING run is retried, at the head of the queue. Ending
        an attempt is idempotent.
        """
        failed = following == run_state.FAILED
        values: dict[str, Any] = {"condition": Run.CONDITION_UNSPECIFIED}
        if failed:
            values["error"] = to_bytes(error) if error is not None else None
        if following == PENDING:
            values["condition"] = Run.CONDITION_RETRYING
            if halve:
                values["halved"] = True
        ended: dict[str, Any] = {"end_us": now_us(), "exit_code": exit_code, "signal": signal}
        ended["error"] = to_bytes(error) if error is not None else None
        this = (attempts.c.run_id == run_id) & (attempts.c.number == number) & attempts.c.end_us.is_(None)
        with transaction(self._engine) as db:
            if not db.execute(update(attempts).where(this).values(**ended)).rowcount:
                # Called again because the first reply was lost.
                return queries.to_run(db, queries.run_row(db, run_id))
            if following == PENDING:
                values["step"] = queries.run_row(db, run_id)["latest_checkpoint"] or 0
            if following == run_state.COMPLETED and queries.run_row(db, run_id)["state"] == STARTING:
                # Nothing was left to do, as after a crash between its last step and its end.
                queries.set_state(db, queries.run_row(db, run_id), RUNNING, {})
            queries.set_state(db, queries.run_row(db, run_id), following, values)
            return queries.to_run(db, queries.run_row(db, run_id))

    def withdraw_attempt(self, run_id: str, number: int) -> None:
        """Deletes the newest attempt, which never started a process: the run is PENDING again, at its old position in
        the queue, or STOPPED if a stop was requested."""
        with transaction(self._engine) as db:
            row = queries.run_row(db, run_id)
            following = run_state.STOPPED if row["state"] == run_state.STOPPING else PENDING
            db.execute(delete(attempts).where(attempts.c.run_id == run_id, attempts.c.number == number))
            values: dict[str, Any] = {"condition": Run.CONDITION_UNSPECIFIED}
            queries.set_state(db, row, following, values | ({"start_us": None} if number == 1 else {}))

    def owner(self, run_id: str) -> str:
        """Client that submitted the run; empty without authentication. Raises StillhouseError(RUN_NOT_FOUND)."""
        with transaction(self._engine) as db:
            return str(queries.run_row(db, run_id)["owner"])

    def halved(self, run_id: str) -> bool:
        """True if the run continues with half its micro-batch."""
        with transaction(self._engine) as db:
            return bool(queries.run_row(db, run_id)["halved"])

    def ended_before(self, time_us: int, *, limit: int) -> list[str]:
        """Ids of at most `limit` runs that ended before `time_us`, oldest first."""
        query = (
            select(runs.c.id)
            .where(runs.c.state.in_(sorted(ENDED)), runs.c.end_us < time_us)
            .order_by(runs.c.end_us)
            .limit(limit)
        )
        with transaction(self._engine) as db:
            return [str(each) for each in db.execute(query).scalars()]

    def totals(self) -> Totals:
        """Sums over all runs, for metrics."""
        with transaction(self._engine) as db:
            return aggregates.read_totals(db)

    def devices(self, run_id: str, number: int) -> tuple[int, ...]:
        """Devices of an attempt; none for the CPU."""
        query = select(attempts.c.devices).where(attempts.c.run_id == run_id, attempts.c.number == number)
        with transaction(self._engine) as db:
            return tuple(int(each) for each in db.execute(query).scalar_one().split(",") if each)

    def attempts_since_request(self, run_id: str) -> int:
        """Attempts since the run was last created or resumed by request."""
        with transaction(self._engine) as db:
            return queries.last_attempt(db, run_id) - int(queries.run_row(db, run_id)["asked_attempt"])

    def offsets(self, run_id: str) -> tuple[int, int]:
        """Bytes of the event and metric journals that are in the store."""
        with transaction(self._engine) as db:
            row = queries.run_row(db, run_id)
            return int(row["events_offset"]), int(row["metrics_offset"])

    def outcome(self, run_id: str, number: int) -> tuple[str | None, Status | None]:
        """Outcome that the process reported (completed, stopped, failed or None), and its error."""
        query = select(attempts).where(attempts.c.run_id == run_id, attempts.c.number == number)
        with transaction(self._engine) as db:
            row = db.execute(query).mappings().one()
        return row["outcome"], Status.FromString(row["error"]) if row["error"] else None

    def record(self, run_id: str, batch: JournalBatch) -> None:
        """Records journal changes and offsets in one transaction."""
        with transaction(self._engine) as db:
            row = queries.run_row(db, run_id)
            points = [point for _, point in batch.metrics]
            last = queries.append_points(db, run_id, int(row["last_sequence"]), batch.metrics)
            values: dict[str, Any] = {**batch.offsets, **batch.progress, "last_sequence": last}
            values["loss_curve"] = loss_curve.extended(row["loss_curve"], points)
            changed = {name: value for name, value in batch.changes.items() if row[name] != value}
            if batch.settles:
                changed["effective_spec"] = batch.settled(row["effective_spec"])
            if row["state"] == STARTING and batch.started:
                changed["state"] = RUNNING
            db.execute(update(runs).where(runs.c.id == run_id).values(**values, **changed))
            for number, outcome in batch.outcomes:
                db.execute(
                    update(attempts)
                    .where(attempts.c.run_id == run_id, attempts.c.number == number)
                    .values(outcome=outcome.kind, error=outcome.error and to_bytes(outcome.error))
                )
            if changed:
                queries.append_run_event(db, run_id)
            if points:
                metric_blocks.extend(db, run_id, last)

    def events(
        self, run_id: str, *, after: int, limit: int, runs_alone: bool = False
    ) -> list[WatchRunResponse]:
        """Up to `limit` events after `after`, in order, without metrics if `runs_alone`; their runs carry no specs."""
        query = (
            select(events)
            .where(events.c.run_id == run_id, events.c.sequence > after)
            .order_by(events.c.sequence)
            .limit(limit)
        )
        if runs_alone:
            query = query.where(events.c.kind == "run")
        with transaction(self._engine) as db:
            return [queries.to_response(row) for row in db.execute(query).mappings().all()]

    def extend_metric_blocks(self, run_id: str) -> bool:
        """Makes blocks for metrics of a run that have none yet; True if there may be more than one call makes."""
        with transaction(self._engine) as db:
            return metric_blocks.extend(db, run_id, int(queries.run_row(db, run_id)["last_sequence"]))

    def metrics(self, run_id: str, *, start: int, end: int | None, max_points: int) -> list[Stored]:
        """Measurements of a run with the steps in [start, end), and some around them; see `metric_blocks.read`."""
        with transaction(self._engine) as db:
            queries.run_row(db, run_id)
            return metric_blocks.read(db, run_id, start=start, end=end, max_points=max_points)

    def delete(self, run_id: str) -> None:
        """Deletes an ended run. Raises StillhouseError(RUN_STATE) if it has not ended."""
        with transaction(self._engine) as db:
            row = queries.run_row(db, run_id)
            if row["state"] not in ENDED:
                raise run_state.state_error(run_id, row["state"], "delete", ENDED)
            db.execute(delete(runs).where(runs.c.id == run_id))

    def _in_states(self, states: Iterable[State]) -> list[Run]:
        query = select(runs).where(runs.c.state.in_(list(states))).order_by(runs.c.queue_number)
        with transaction(self._engine) as db:
            return queries.to_runs(db, db.execute(query).mappings().all())


def _first(found: Sequence[RowMapping], max_bytes: int) -> Sequence[RowMapping]:
    """The first rows, at least one, with about `max_bytes` of specs."""
    num_bytes = 0
    for index, row in enumerate(found):
        num_bytes += len(row["spec"]) + len(row["effective_spec"])
        if num_bytes > max_bytes:
            return found[: index + 1]
    return found
