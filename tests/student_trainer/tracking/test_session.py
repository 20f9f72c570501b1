"""Steps reach a tracker once, over kills and resumes, and examples, settings and links with them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from stillhouse.protos.evaluation.examples import place_of
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.tracking.place import Place
from stillhouse.student_trainer.tracking.run_facts import state_of, state_path, tracked_run
from stillhouse.student_trainer.tracking.session import Session, place_path
from stillhouse.student_trainer.tracking.tracker import Point, Table, TrackedRun
from tests.student_trainer.tracking.tracked import RUN_ID, TEXTS, make_run, track, write_attempt


class Recorder:
    """A tracker in memory, which may fail as one does whose server is away."""

    def __init__(self, *, repeats_safely: bool = False, fails_at: int = 0) -> None:
        self.repeats_safely = repeats_safely
        self.fails_at = fails_at
        self.points: list[Point] = []
        self.tables: list[Table] = []
        self.links: dict[str, str] = {}
        self.opened: list[str] = []
        self.closed: list[str] = []

    def open(self, run: TrackedRun, known: str) -> str:
        self.opened.append(known)
        return run.id

    def log(self, points: Sequence[Point]) -> None:
        for point in points:
            if point.step == self.fails_at:
                raise ConnectionError("away")
            self.points.append(point)

    def add_table(self, table: Table) -> None:
        self.tables.append(table)

    def add_links(self, links: Mapping[str, str]) -> None:
        self.links |= links

    def close(self, state: str) -> None:
        self.closed.append(state)

    @property
    def steps(self) -> list[int]:
        return [each.step for each in self.points if "train/loss" in each.values]


def never(_wait_s: float) -> bool:
    return False


def send(run_dir: RunDir, tracker: Recorder) -> bool:
    return Session(run_dir, "wandb", tracker).run(never)


def test_a_resumed_run_goes_on_in_the_same_tracker_run_without_a_step_twice(tmp_path: Path) -> None:
    run_dir, tracker = make_run(tmp_path, "wandb"), Recorder()
    write_attempt(run_dir, 1, [1, 2, 3, 4], end="stopped")
    assert send(run_dir, tracker)
    write_attempt(run_dir, 2, [3, 4, 5, 6], end="completed")
    assert send(run_dir, tracker)
    assert tracker.steps == [1, 2, 3, 4, 5, 6]
    assert [each.step for each in tracker.points if "eval/kl" in each.values] == [4, 6]
    assert (tracker.opened, tracker.closed) == (["", RUN_ID], ["STOPPED", "COMPLETED"])
    assert tracker.points[0].time_ms > 1.7e12
    assert tracker.links["final_model"] == f"runs/{RUN_ID}/final"
    [table] = tracker.tables
    assert (table.columns, len(table.rows)) == (["set", "text", "reference"], len(TEXTS))
    assert send(run_dir, tracker)  # nothing is sent again, the examples neither
    assert (len(tracker.tables), tracker.steps[-1]) == (1, 6)


def test_examples_of_each_evaluation_are_rows_with_the_token_farthest_from_the_teacher(
    tmp_path: Path,
) -> None:
    run_dir, tracker = make_run(tmp_path, "wandb"), Recorder()
    evaluated: tuple[tuple[int, list[float | None]], ...] = ((2, [0.5, 1.5]), (10, [None, 0.25]))
    for step, kls in evaluated:
        targets: list[dict[str, Any]] = [{"at": at + 1, "kl": kl, "top": []} for at, kl in enumerate(kls)]
        row = {"set": "", "number": 3, "texts": ["a", " b", " c"], "targets": targets}
        path = run_dir.path / place_of(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"step": step, "rows": [row]}))
    (run_dir.path / place_of(11)).write_text("{")  # a damaged one is left out
    write_attempt(run_dir, 1, [1, 10], end="stopped")
    assert send(run_dir, tracker)
    assert [(each.name, each.of_step, each.step) for each in tracker.tables] == [
        ("examples", 2, 10),
        ("examples", 10, 10),
    ]
    rows = [dict(zip(each.columns, *each.rows, strict=True)) for each in tracker.tables]
    common = {"set": "", "row": 3, "text": "a b c"}
    assert rows[0] == {"step": 2, **common, "mean_kl": 1.0, "worst_kl": 1.5, "worst_token": " c"}
    assert rows[1] == {"step": 10, **common, "mean_kl": 0.25, "worst_kl": 0.25, "worst_token": " c"}


def test_a_table_waits_for_the_points_of_its_step(tmp_path: Path) -> None:
    run_dir, tracker = make_run(tmp_path, "wandb"), Recorder()
    path = run_dir.path / place_of(5)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"step": 5, "rows": []}))
    write_attempt(run_dir, 1, [1, 2])
    told = state_path(run_dir)
    told.parent.mkdir(exist_ok=True)
    told.write_text('{"state": "RUNNING"}')

    def go_on(_wait_s: float) -> bool:
        if tracker.steps == [1, 2]:
            assert not tracker.tables  # trackers refuse points behind it
            write_attempt(run_dir, 2, [3, 4, 5], end="stopped")
            told.write_text('{"state": "STOPPED"}')
        return False

    assert Session(run_dir, "wandb", tracker).run(go_on)
    assert tracker.steps == [1, 2, 3, 4, 5]
    assert [each.step for each in tracker.tables] == [5]


@pytest.mark.parametrize("repeats_safely", [True, False])
def test_points_of_a_failed_request_come_again_only_where_that_is_safe(
    tmp_path: Path, repeats_safely: bool
) -> None:
    run_dir = make_run(tmp_path, "wandb")
    write_attempt(run_dir, 1, [1, 2, 3], end="stopped")
    tracker = Recorder(repeats_safely=repeats_safely, fails_at=2)
    with pytest.raises(ConnectionError):
        send(run_dir, tracker)
    assert Place.load(place_path(run_dir, "wandb")).pending is not repeats_safely
    tracker.fails_at = 0
    assert send(run_dir, tracker)
    assert tracker.steps == ([1, 1, 2, 3] if repeats_safely else [1])


def test_a_run_that_goes_on_is_followed_until_it_ends_or_the_process_is_stopped(tmp_path: Path) -> None:
    run_dir, tracker = make_run(tmp_path, "wandb"), Recorder()
    write_attempt(run_dir, 1, [1, 2])
    state_path(run_dir).parent.mkdir(exist_ok=True)
    state_path(run_dir).write_text(json.dumps({"state": "RUNNING"}))
    waits = 0

    def stop(_wait_s: float) -> bool:
        nonlocal waits
        waits += 1
        if waits == 2:
            write_attempt(run_dir, 2, [3, 4])
        return waits == 3

    assert not Session(run_dir, "wandb", tracker).run(stop)
    assert (tracker.steps, tracker.closed) == ([1, 2, 3, 4], [""])
    state_path(run_dir).write_text(json.dumps({"state": "FAILED"}))
    assert send(run_dir, tracker)
    assert tracker.closed == ["", "FAILED"]
    assert Place.load(place_path(run_dir, "wandb")).ended == "FAILED"


def test_every_call_of_a_library_has_a_limit(tmp_path: Path) -> None:
    run_dir, limits, within = make_run(tmp_path, "wandb"), [], threading.Event()
    write_attempt(run_dir, 1, [1], end="completed")

    @contextmanager
    def watch(limit_s: float) -> Iterator[None]:
        limits.append(limit_s)
        within.set()
        yield
        within.clear()

    class Watched(Recorder):
        def log(self, points: Sequence[Point]) -> None:
            assert within.is_set()
            super().log(points)

        def add_table(self, table: Table) -> None:
            assert within.is_set()
            super().add_table(table)

    Session(run_dir, "wandb", Watched(), watch=watch).run(never)
    assert len(limits) == 5  # to open, a batch of points, a table, the links, to close
    assert not within.is_set()


def test_the_state_without_a_service_is_told_by_the_events(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "wandb")
    write_attempt(run_dir, 1, [1])
    assert state_of(run_dir) == "FAILED"  # it was killed
    write_attempt(run_dir, 2, [2], end="stopped")
    assert state_of(run_dir) == "STOPPED"
    with run_dir.open_attempt(2):
        assert state_of(run_dir) == "RUNNING"


def test_settings_hold_what_training_uses_and_no_address_of_webhooks(tmp_path: Path) -> None:
    run = tracked_run(make_run(tmp_path, {"kind": "wandb", "project": "p", "name": "n"}), "wandb")
    assert (run.name, run.tracker.project, run.labels) == ("n", "p", {"team": "a"})
    flat = run.flat_settings()
    assert float(flat["optimizer.learning_rate"]) == 1e-5
    assert flat["teachers[0].targets"] == "['127.0.0.1:7401']"
    assert not {"notify", "trackers"} & run.settings.keys()
    json.dumps(run.settings)


def test_tensorboard_gets_settings_examples_and_links_beside_the_curves(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path, "tensorboard")
    write_attempt(run_dir, 1, [1, 2], end="completed")
    done = track(run_dir, "tensorboard")
    assert done.returncode == 0, done.stderr
    events = EventAccumulator(str(run_dir.tensorboard_path / "about")).Reload()
    assert set(events.Tags()["tensors"]) == {"settings", "texts_after", "final_model"}
    [text] = events.Tensors("texts_after")
    assert b"a\\|b c" in text.tensor_proto.string_val[0]
    assert track(run_dir, "wandb").returncode == 1  # it is no tracker of this run
