"""Journal ingestion: each line once, malformed lines skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse.protos.errors import Reason, StillhouseError, to_json, to_status
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.student_trainer.config.schema import LossConfig
from stillhouse.student_trainer.config.settled.layer_pairs import EVEN, LayerChoice
from stillhouse.student_trainer.config.settled.target_choice import TargetChoice
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.runs.store import run_state
from stillhouse.student_trainer.runs.store.store import Store
from stillhouse.student_trainer.runs.supervision.journal_tail import ChangeNotifier, JournalTail
from tests.student_trainer.config.specs import changed
from tests.student_trainer.runs.store.store_contract import SPEC, new_run, steps_of

RUN, OTHER = "aaaaaaaaaaaa", "bbbbbbbbbbbb"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store.open(tmp_path / "stillhouse.db")
    new_run(opened)
    opened.begin_attempt(RUN, ())
    yield opened
    opened.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir.create(tmp_path / RUN, SPEC, SPEC)


def test_reports_of_a_process_are_stored(store: Store, run_dir: RunDir) -> None:
    tail = JournalTail(store, RUN, run_dir, 1)
    assert not tail.ingest()
    with run_dir.open_attempt(1) as attempt:
        choice = TargetChoice.draws(
            LossConfig(), "the teacher draws", form="top_k_and_sampled", vocab_size=4096
        )
        attempt.report("settled", targets={"loss": choice.to_json()})
        attempt.report("started", total_steps=9, step=0)
        attempt.report_metrics(0, {"eval/kl": 2.0})
        attempt.report_metrics(
            1, {"train/loss": 1.5, "train/trained_tokens": 40, "train/tokens_per_second": 8.5}
        )
        attempt.report("checkpoint", step=1)
        attempt.report("condition", condition="WAITING_FOR_TEACHER")
        assert tail.ingest()
        run = store.get(RUN)
        assert run.state == Run.STATE_RUNNING
        assert (run.effective_spec.loss.sparse_target, run.effective_spec.loss.top_k) == (
            "top_k_and_sampled",
            16,
        )
        assert run.effective_spec.loss.sparse_target_reason == "the teacher draws"
        assert run.condition == Run.CONDITION_WAITING_FOR_TEACHER
        assert (run.progress.step, run.progress.total_steps, run.progress.trained_tokens) == (1, 9, 40)
        assert run.progress.tokens_per_second == 8.5
        assert run.latest_checkpoint == f"runs/{RUN}/checkpoints/1"
        attempt.report("condition", condition="")
        error = to_status(StillhouseError(Reason.DATASET_INVALID, "Row 3 has no text."))
        attempt.report("failed", error=to_json(error))
    assert tail.ingest()
    assert store.get(RUN).condition == Run.CONDITION_UNSPECIFIED
    assert store.outcome(RUN, 1) == ("failed", error)
    assert not tail.ingest()


def test_settled_layers_are_stored(store: Store, run_dir: RunDir) -> None:
    spec = changed("loss.hidden_mse", {"weight": 2})
    store.create(OTHER, spec, spec, request_id="", version="1")
    store.begin_attempt(OTHER, ())
    choice = LayerChoice.by(EVEN, teacher_layers=4, student_layers=2)
    with run_dir.open_attempt(1) as attempt:
        attempt.report("settled", layers={"loss": choice.to_json(), "contexts[0].loss": choice.to_json()})
    assert JournalTail(store, OTHER, run_dir, 1).ingest()
    hidden = store.get(OTHER).effective_spec.loss.hidden_mse
    assert [(each.teacher, each.student) for each in hidden.layers] == [(2, 1), (4, 2)]
    assert (hidden.weight, hidden.layers_reason) == (2, choice.layers_reason)


def test_between_attempts_the_step_is_the_checkpoints(store: Store, run_dir: RunDir) -> None:
    """The next attempt resumes from the checkpoint and repeats later steps."""
    with run_dir.open_attempt(1) as attempt:
        attempt.report("checkpoint", step=2)
        attempt.report_metrics(5, {"train/loss": 1.0})
    JournalTail(store, RUN, run_dir, 1).ingest()
    assert store.get(RUN).progress.step == 5
    retried = store.end_attempt(RUN, 1, run_state.PENDING, exit_code=1, signal=0, error=None)
    assert retried.progress.step == 2
    store.begin_attempt(RUN, ())
    with run_dir.open_attempt(2) as attempt:
        attempt.report_metrics(4, {"train/loss": 1.0})
    JournalTail(store, RUN, run_dir, 2).ingest()
    assert store.end_attempt(RUN, 2, run_state.FAILED, exit_code=1, signal=0, error=None).progress.step == 4
    resumed = store.resume(RUN)
    assert resumed.progress.step == 2


def test_a_reader_that_starts_again_reads_nothing_twice(store: Store, run_dir: RunDir) -> None:
    with run_dir.open_attempt(1) as attempt:
        attempt.report("started", total_steps=9)
        for step in range(1, 6):
            attempt.report_metrics(step, {"train/loss": 1.0})
            JournalTail(store, RUN, run_dir, 1).ingest()
    assert steps_of(store, RUN) == [1, 2, 3, 4, 5]


def test_a_line_of_a_replaced_attempt_changes_nothing(store: Store, run_dir: RunDir) -> None:
    """Its process was suspended after the fence check and then wrote its line."""
    with run_dir.open_attempt(1) as attempt:
        attempt.report("checkpoint", step=2)
        attempt.report_metrics(3, {"train/loss": 3.0})
    JournalTail(store, RUN, run_dir, 1).ingest()
    store.end_attempt(RUN, 1, run_state.PENDING, exit_code=1, signal=0, error=None)
    store.begin_attempt(RUN, ())
    tail = JournalTail(store, RUN, run_dir, 2)
    with run_dir.open_attempt(2) as attempt:
        attempt.report("started", total_steps=9, step=2)
        attempt.report("checkpoint", step=4)
        attempt.report_metrics(4, {"train/loss": 4.0})
    tail.ingest()
    before = store.get(RUN)
    for path, late in (
        (run_dir.events_path, {"kind": "checkpoint", "step": 3}),
        (run_dir.events_path, {"kind": "condition", "condition": "WAITING_FOR_TEACHER"}),
        (run_dir.metrics_path, {"step": 3, "values": {"train/loss": 9.0}}),
    ):
        with path.open("a") as file:
            file.write(
                json.dumps({"sequence": 9, "attempt": 1, "time": "2026-01-01T00:00:00Z"} | late) + "\n"
            )
    assert tail.ingest()
    after = store.get(RUN)
    assert (after.latest_checkpoint, after.condition) == (before.latest_checkpoint, before.condition)
    assert after.progress == before.progress
    assert steps_of(store, RUN) == [3, 4]


def test_a_malformed_line_is_skipped(store: Store, run_dir: RunDir) -> None:
    lines = [
        *(
            '{"sequence":1}',
            '{"sequence":2,"kind":"started"}',
            '{"sequence":3,"kind":"checkpoint","step":"x"}',
        ),
        *('{"sequence":4,"kind":"condition","condition":"BORED"}', '{"sequence":5,"kind":"unheard of"}'),
        '{"sequence":6,"attempt":1,"kind":"started","total_steps":3}',
    ]
    run_dir.events_path.write_text("\n".join(lines) + "\n")
    run_dir.metrics_path.write_text(
        '{"sequence":1,"attempt":1,"step":1,"time":"yesterday","values":{"a":1}}\n'
        '{"sequence":2,"attempt":1,"step":2,"time":"2026-01-01T00:00:00Z","values":[]}\n'
        '{"sequence":3,"attempt":1,"step":3,"time":"2026-01-01T00:00:00Z","values":{"train/loss":NaN,"train/tokens_per_second":NaN}}\n'
        '{"sequence":4,"attempt":1,"step":1e30,"time":"2026-01-01T00:00:00Z","values":{}}\n'
    )
    assert JournalTail(store, RUN, run_dir, 1).ingest()
    assert store.get(RUN).progress.total_steps == 3
    assert steps_of(store, RUN) == [3]


async def test_a_change_wakes_the_subscribers_of_a_run() -> None:
    notifier = ChangeNotifier()
    with notifier.subscribe("a") as one, notifier.subscribe("b") as other:
        notifier.notify("a")
        assert (one.is_set(), other.is_set()) == (True, False)
        notifier.close()
        assert other.is_set()
    notifier.notify("a")
