"""Contract of every store; a test module provides the fixture `store` and inherits these tests."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from stillhouse.protos.errors import Reason, StillhouseError, to_status
from stillhouse.protos.stillhouse.v1.run_pb2 import MetricPoint, Run, RunSpec
from stillhouse.student_trainer.runs.store import metric_blocks, run_state
from stillhouse.student_trainer.runs.store.journal_ingest import JournalBatch, ReportedOutcome
from stillhouse.student_trainer.runs.store.metric_series import to_series
from stillhouse.student_trainer.runs.store.queries import now_us
from stillhouse.student_trainer.runs.store.run_filter import RunFilter
from stillhouse.student_trainer.runs.store.store import Store
from tests.student_trainer.config.specs import SMALLEST, changed, spec_of

SPEC = spec_of(SMALLEST)


def new_run(store: Store, run_id: str = "aaaaaaaaaaaa", *, request_id: str = "") -> Run:
    return store.create(run_id, SPEC, SPEC, request_id=request_id, version="1")[0]


def point(step: int, value: float, attempt: int = 1) -> tuple[int, MetricPoint]:
    return attempt, MetricPoint(step=step, values={"train/loss": value}, attempt=attempt)


def batch(offset: int, *points: tuple[int, MetricPoint]) -> JournalBatch:
    return JournalBatch(offsets={"events_offset": 0, "metrics_offset": offset}, metrics=list(points))


def steps_of(
    store: Store, run_id: str = "aaaaaaaaaaaa", *, start: int = 0, end: int | None = None
) -> list[int]:
    """Steps of the run's metric points."""
    measured = (each.parse() for each in store.metrics(run_id, start=start, end=end, max_points=1000))
    return [each.step for each in measured if isinstance(each, MetricPoint)]


class StoreContract:
    def test_a_created_run_is_pending_behind_the_others(self, store: Store) -> None:
        first, second = new_run(store), new_run(store, "bbbbbbbbbbbb")
        assert first.name == "runs/aaaaaaaaaaaa"
        assert first.spec == SPEC
        assert (first.state, first.queue_position, second.queue_position) == (Run.STATE_PENDING, 0, 1)
        assert [run.name for run in store.queue()] == [first.name, second.name]
        assert store.get("aaaaaaaaaaaa") == first

    def test_an_unknown_run_is_named(self, store: Store) -> None:
        with pytest.raises(StillhouseError, match="no run zzzzzzzzzzzz") as caught:
            store.get("zzzzzzzzzzzz")
        assert (caught.value.reason, caught.value.resource) == (Reason.RUN_NOT_FOUND, "runs/zzzzzzzzzzzz")

    def test_a_request_id_makes_one_run(self, store: Store) -> None:
        run, created = store.create("aaaaaaaaaaaa", SPEC, SPEC, request_id="r", version="1")
        again, created_again = store.create("bbbbbbbbbbbb", SPEC, SPEC, request_id="r", version="1")
        assert (created, created_again) == (True, False)
        assert again == run == store.find_request("r", SPEC)
        with pytest.raises(StillhouseError) as caught:
            store.create("cccccccccccc", changed("loss.top_k", 3), SPEC, request_id="r", version="1")
        assert caught.value.reason is Reason.REQUEST_CONFLICT
        assert store.ids() == {"aaaaaaaaaaaa"}

    def test_an_owner_may_queue_a_limited_number_of_runs_and_is_stored(self, store: Store) -> None:
        def create(run_id: str, owner: str, request_id: str = "") -> Run:
            return store.create(
                run_id, SPEC, SPEC, request_id=request_id, version="1", owner=owner, max_queued=2
            )[0]

        create("aaaaaaaaaaaa", "ada", "r"), create("bbbbbbbbbbbb", "ada")
        create("cccccccccccc", "ben")
        assert store.owner("aaaaaaaaaaaa") == "ada"
        with pytest.raises(StillhouseError, match="2 runs of ada are queued") as caught:
            create("dddddddddddd", "ada")
        assert caught.value.reason is Reason.QUOTA
        assert create("eeeeeeeeeeee", "ada", "r").name == "runs/aaaaaaaaaaaa", (
            "a repeated request is no further run"
        )
        store.begin_attempt("aaaaaaaaaaaa", ())
        create("dddddddddddd", "ada")
        store.stop("bbbbbbbbbbbb")
        create("ffffffffffff", "ada")
        with pytest.raises(StillhouseError, match="are queued"):
            store.resume("bbbbbbbbbbbb", max_queued=2)
        store.resume("bbbbbbbbbbbb", max_queued=3)

    def test_a_run_is_halved_once_and_for_good(self, store: Store) -> None:
        new_run(store)
        end = {"exit_code": 137, "signal": 9, "error": None}
        assert store.begin_attempt("aaaaaaaaaaaa", ()) == 1
        assert not store.halved("aaaaaaaaaaaa")
        store.end_attempt("aaaaaaaaaaaa", 1, run_state.PENDING, **end, halve=True)  # type: ignore[arg-type]
        assert store.begin_attempt("aaaaaaaaaaaa", ()) == 2
        store.end_attempt("aaaaaaaaaaaa", 2, run_state.FAILED, **end)  # type: ignore[arg-type]
        assert store.halved("aaaaaaaaaaaa")
        store.resume("aaaaaaaaaaaa")
        assert store.halved("aaaaaaaaaaaa")

    def test_a_resume_changes_the_effective_spec_or_nothing(self, store: Store) -> None:
        new_run(store)
        store.begin_attempt("aaaaaaaaaaaa", ())
        store.end_attempt(
            "aaaaaaaaaaaa", 1, run_state.PENDING, exit_code=137, signal=9, error=None, halve=True
        )
        before = store.stop("aaaaaaaaaaaa")

        def refuse(_: RunSpec) -> RunSpec:
            raise StillhouseError(Reason.INVALID_SPEC, "Not so.")

        def rename(effective: RunSpec) -> RunSpec:
            effective.display_name = "changed"
            return effective

        with pytest.raises(StillhouseError, match="Not so"):
            store.resume("aaaaaaaaaaaa", refuse, whole_micro_batch=True)
        assert store.get("aaaaaaaaaaaa") == before
        assert store.halved("aaaaaaaaaaaa")
        run = store.resume("aaaaaaaaaaaa", rename, whole_micro_batch=True)
        assert (run.spec, run.effective_spec.display_name) == (before.spec, "changed")
        assert not store.halved("aaaaaaaaaaaa")

    def test_old_ended_runs_are_found_and_sums_are_right(self, store: Store) -> None:
        for letter in "abcd":
            new_run(store, letter * 12)
        store.stop("a" * 12)
        middle_us = now_us()
        store.stop("b" * 12)
        store.begin_attempt("c" * 12, ())
        assert store.ended_before(middle_us, limit=5) == ["a" * 12]
        assert store.ended_before(now_us() + 1, limit=5) == ["a" * 12, "b" * 12]
        assert store.ended_before(now_us() + 1, limit=1) == ["a" * 12]
        sums = store.totals()
        assert sums.states == dict.fromkeys(run_state.TRANSITIONS, 0) | {
            run_state.STOPPED: 2,
            run_state.STARTING: 1,
            run_state.PENDING: 1,
        }
        assert (sums.attempts, sums.retries, sums.waiting_for_teacher, sums.trained_tokens) == (1, 0, 0, 0)
        assert 0 < sums.oldest_queued_s < 3600

    def test_every_change_of_a_run_is_an_event(self, store: Store) -> None:
        run_id = "aaaaaaaaaaaa"
        new_run(store)
        assert store.begin_attempt(run_id, (0, 1)) == 1
        assert store.devices(run_id, 1) == (0, 1)
        started = JournalBatch(offsets={"events_offset": 9}, started=True, changes={"total_steps": 5})
        store.record(run_id, started)
        store.record(run_id, batch(10, point(1, 0.5), point(2, 0.25)))
        done = JournalBatch(
            offsets={"events_offset": 20}, outcomes=[(1, ReportedOutcome(kind="completed", error=None))]
        )
        store.record(run_id, done)
        assert store.outcome(run_id, 1) == ("completed", None)
        run = store.end_attempt(run_id, 1, run_state.COMPLETED, exit_code=0, signal=0, error=None)
        assert run.state == Run.STATE_COMPLETED
        assert run.HasField("end_time")
        assert (run.attempts[0].first_step, run.attempts[0].last_step) == (1, 2)
        assert store.offsets(run_id) == (20, 10)
        events = store.events(run_id, after=0, limit=100)
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        states = [event.run.state for event in events if event.HasField("run")]
        assert states == [
            Run.STATE_PENDING,
            Run.STATE_STARTING,
            Run.STATE_RUNNING,
            Run.STATE_COMPLETED,
        ]
        assert [event.metrics.step for event in events if event.HasField("metrics")] == [1, 2]
        assert store.get_with_sequence(run_id)[1] == events[-1].sequence
        assert store.events(run_id, after=2, limit=1)[0].sequence == 3

    def test_a_change_that_changes_nothing_is_no_event(self, store: Store) -> None:
        new_run(store)
        store.begin_attempt("aaaaaaaaaaaa", ())
        changes = {"total_steps": 5}
        store.record("aaaaaaaaaaaa", JournalBatch(offsets={}, started=True, changes=changes))
        before = store.get_with_sequence("aaaaaaaaaaaa")[1]
        store.record(
            "aaaaaaaaaaaa", JournalBatch(offsets={"events_offset": 7}, started=True, changes=changes)
        )
        assert store.get_with_sequence("aaaaaaaaaaaa")[1] == before

    def test_only_an_allowed_state_is_changed(self, store: Store) -> None:
        new_run(store)
        with pytest.raises(StillhouseError) as caught:
            store.resume("aaaaaaaaaaaa")
        assert caught.value.reason is Reason.RUN_STATE
        with pytest.raises(StillhouseError, match="delete needs one of"):
            store.delete("aaaaaaaaaaaa")

    def test_stopping_is_idempotent_and_a_completed_run_does_not_stop(self, store: Store) -> None:
        run_id = "aaaaaaaaaaaa"
        new_run(store)
        assert store.stop(run_id).state == store.stop(run_id).state == Run.STATE_STOPPED
        store.resume(run_id)
        store.begin_attempt(run_id, ())
        assert store.stop(run_id).state == store.stop(run_id).state == Run.STATE_STOPPING
        store.end_attempt(run_id, 1, run_state.COMPLETED, exit_code=0, signal=0, error=None)
        with pytest.raises(StillhouseError, match="is COMPLETED; stop needs one of"):
            store.stop(run_id)

    def test_a_stopped_queued_run_is_not_launched(self, store: Store) -> None:
        new_run(store)
        store.stop("aaaaaaaaaaaa")
        with pytest.raises(StillhouseError, match="launch"):
            store.begin_attempt("aaaaaaaaaaaa", ())

    def test_a_retry_goes_first_and_a_resumed_run_last(self, store: Store) -> None:
        new_run(store)
        new_run(store, "bbbbbbbbbbbb")
        store.begin_attempt("aaaaaaaaaaaa", ())
        error = to_status(StillhouseError(Reason.PROCESS_DIED, "It died."))
        run = store.end_attempt("aaaaaaaaaaaa", 1, run_state.PENDING, exit_code=137, signal=9, error=error)
        assert (run.condition, run.queue_position) == (Run.CONDITION_RETRYING, 0)
        assert (run.attempts[0].signal, run.attempts[0].error.message) == (9, "It died.")
        assert not run.HasField("error")
        assert store.attempts_since_request("aaaaaaaaaaaa") == 1
        store.begin_attempt("aaaaaaaaaaaa", ())
        run = store.end_attempt("aaaaaaaaaaaa", 2, run_state.FAILED, exit_code=1, signal=0, error=error)
        assert run.error.message == "It died."
        run = store.resume("aaaaaaaaaaaa")
        assert (run.queue_position, run.HasField("error"), run.HasField("end_time")) == (1, False, False)
        assert store.attempts_since_request("aaaaaaaaaaaa") == 0

    def test_ending_an_attempt_is_idempotent(self, store: Store) -> None:
        new_run(store)
        store.begin_attempt("aaaaaaaaaaaa", ())
        first = store.end_attempt("aaaaaaaaaaaa", 1, run_state.FAILED, exit_code=1, signal=0, error=None)
        again = store.end_attempt("aaaaaaaaaaaa", 1, run_state.COMPLETED, exit_code=0, signal=0, error=None)
        assert again == first
        assert first.state == Run.STATE_FAILED

    def test_an_attempt_without_a_process_is_withdrawn(self, store: Store) -> None:
        first, second = new_run(store), new_run(store, "bbbbbbbbbbbb")
        store.begin_attempt("aaaaaaaaaaaa", ())
        store.withdraw_attempt("aaaaaaaaaaaa", 1)
        run = store.get("aaaaaaaaaaaa")
        assert (run.state, run.queue_position, len(run.attempts)) == (Run.STATE_PENDING, 0, 0)
        assert not run.HasField("start_time")
        assert [each.name for each in store.queue()] == [first.name, second.name]
        assert store.begin_attempt("aaaaaaaaaaaa", ()) == 1
        store.stop("aaaaaaaaaaaa")
        store.withdraw_attempt("aaaaaaaaaaaa", 1)
        assert store.get("aaaaaaaaaaaa").state == Run.STATE_STOPPED

    def test_many_runs_are_read_like_single_ones(self, store: Store) -> None:
        for letter in "abcd":
            new_run(store, letter * 12)
        store.begin_attempt("b" * 12, (1,))
        store.end_attempt("b" * 12, 1, run_state.PENDING, exit_code=1, signal=0, error=None)
        store.begin_attempt("b" * 12, (1,))
        store.stop("c" * 12)
        listed, _ = store.page(RunFilter(), before=None, limit=10)
        assert listed == [store.get(letter * 12) for letter in "dcba"]
        assert store.live() == [store.get("b" * 12)]
        assert [run.queue_position for run in store.queue()] == [0, 1]

    def test_a_condition_is_set_only_in_place_of_another(self, store: Store) -> None:
        new_run(store)
        waiting, adopting = Run.CONDITION_WAITING_FOR_TEACHER, Run.CONDITION_ADOPTING
        store.set_condition("aaaaaaaaaaaa", waiting, instead_of=adopting)
        assert store.get("aaaaaaaaaaaa").condition == Run.CONDITION_UNSPECIFIED
        store.set_condition("aaaaaaaaaaaa", waiting, instead_of=Run.CONDITION_UNSPECIFIED)
        assert store.get("aaaaaaaaaaaa").condition == waiting

    def test_metrics_are_found_by_step(self, store: Store) -> None:
        new_run(store)
        store.begin_attempt("aaaaaaaaaaaa", ())
        store.record("aaaaaaaaaaaa", batch(10, *(point(step, step / 10) for step in range(10))))
        assert steps_of(store, start=2, end=5) == [2, 3, 4]
        assert len(steps_of(store)) == 10

    def test_curves_of_a_long_run_are_those_of_all_its_points(self, store: Store) -> None:
        """Whatever is rolled back, and wherever a range begins and ends: ends and extremes are kept."""
        generator, step = random.Random(3), 0
        points: list[tuple[int, MetricPoint]] = []
        for number in range(3000):
            step = max(0, step - generator.randrange(150)) if number % 400 == 399 else step
            step += 1
            points.append(point(step, generator.random()))
            if number % 50 == 0:
                points.append((1, MetricPoint(step=step, values={"eval/kl": generator.random()})))
        new_run(store)
        store.begin_attempt("aaaaaaaaaaaa", ())
        for at in range(0, len(points), 70):
            store.record("aaaaaaaaaaaa", batch(at, *points[at : at + 70]))
        for start, end, most in (
            (0, None, 100),
            (0, None, 8),
            (700, 2100, 50),
            (40, 72, 10),
            (step, None, 9),
        ):
            stored = store.metrics("aaaaaaaaaaaa", start=start, end=end, max_points=most)
            limits = {"start": start, "end": end}
            found = to_series((each.parse() for each in stored), max_points=most, **limits)  # type: ignore[arg-type]
            whole = to_series((each for _, each in points), max_points=10**6, **limits)  # type: ignore[arg-type]
            assert [each.key for each in found] == [each.key for each in whole]
            for few, many in zip(found, whole, strict=True):
                everything = dict(zip(many.steps, many.values, strict=True))
                assert {key: everything[key] for key in few.steps} == dict(
                    zip(few.steps, few.values, strict=True)
                )
                assert (few.steps[0], few.steps[-1]) == (many.steps[0], many.steps[-1])
                assert (min(few.values), max(few.values)) == (min(many.values), max(many.values))
        assert len(stored) < len(store.metrics("aaaaaaaaaaaa", start=0, end=None, max_points=8)) < 400

    def test_metrics_of_earlier_versions_get_their_blocks(
        self, store: Store, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        new_run(store)
        store.begin_attempt("aaaaaaaaaaaa", ())
        with monkeypatch.context() as before:
            before.setattr(metric_blocks, "extend", lambda *_: False)
            store.record("aaaaaaaaaaaa", batch(0, *(point(step, step / 10) for step in range(1, 301))))
        assert len(steps_of(store)) == 300
        monkeypatch.setattr(metric_blocks, "POINTS_AT_ONCE", 64)
        calls = 0
        while store.extend_metric_blocks("aaaaaaaaaaaa"):
            calls += 1
        assert calls == 4
        stored = store.metrics("aaaaaaaaaaaa", start=0, end=None, max_points=4)
        assert sum(each.is_block for each in stored) >= 1
        (series,) = to_series((each.parse() for each in stored), max_points=4)
        assert (series.steps[0], series.steps[-1]) == (1, 300)

    def test_a_run_tells_its_changes_and_their_times(self, store: Store) -> None:
        before_us = now_us()
        new_run(store)
        store.begin_attempt("aaaaaaaaaaaa", ())
        started = JournalBatch(offsets={}, started=True, changes={"total_steps": 9})
        store.record("aaaaaaaaaaaa", started)
        saved = JournalBatch(offsets={}, changes={"latest_checkpoint": 4}, progress={"step": 5})
        store.record("aaaaaaaaaaaa", saved)
        store.end_attempt("aaaaaaaaaaaa", 1, run_state.COMPLETED, exit_code=0, signal=0, error=None)
        assert store.get("aaaaaaaaaaaa").history == []
        history = store.get("aaaaaaaaaaaa", with_history=True).history
        told = [(run_state.state_name(each.state), each.step, each.checkpoint_step) for each in history]
        assert told == [
            *(("PENDING", 0, 0), ("STARTING", 0, 0), ("RUNNING", 0, 0)),
            *(("RUNNING", 5, 4), ("COMPLETED", 5, 4)),
        ]
        times = [before_us, *(each.time.ToMicroseconds() for each in history), now_us()]
        assert times == sorted(times)
        assert [each.sequence for each in history] == [1, 2, 3, 4, 5]

    def test_a_deleted_run_leaves_nothing(self, store: Store) -> None:
        run_id = "aaaaaaaaaaaa"
        new_run(store, request_id="r")
        store.begin_attempt(run_id, ())
        store.record(run_id, batch(10, point(1, 1.0)))
        store.end_attempt(run_id, 1, run_state.FAILED, exit_code=1, signal=0, error=None)
        store.delete(run_id)
        assert store.ids() == set()
        assert store.events(run_id, after=0, limit=10) == []
        assert store.find_request("r", SPEC) is None
        assert new_run(store, run_id).attempts == []

    def test_one_of_many_equal_requests_makes_the_run(self, store: Store) -> None:
        lock = threading.Lock()  # the service has a single thread

        def create(i: int) -> Run:
            with lock:
                return store.create(f"aaaaaaaaaa{i:02}", SPEC, SPEC, request_id="r", version="1")[0]

        with ThreadPoolExecutor(8) as pool:
            names = {run.name for run in pool.map(create, range(50))}
        assert len(names) == len(store.ids()) == 1
