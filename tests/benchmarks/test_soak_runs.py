"""A small soak of a run service killed in the middle of its runs, and the checker that detects losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.soak.history import History, RunHistory, check
from benchmarks.soak.runs import STEPS, soak
from stillhouse.protos.stillhouse.v1.run_pb2 import Run


@pytest.mark.model
@pytest.mark.slow
def test_a_service_that_is_killed_loses_no_run(tmp_path: Path) -> None:
    outcome = soak(tmp_path, runs=5, kills=1, slots=2, seed=1)
    assert outcome.faults == []
    assert (outcome.kills, sum(outcome.states.values())) == (1, 5)
    history = History.read(tmp_path / "data", None)
    (good, *_) = (each for each in history.runs.values() if each.run.state == Run.STATE_COMPLETED)
    assert faults_of(good) == []
    points = [index for index, event in enumerate(good.events) if event.HasField("metrics")]
    assert "gaps" in faults_of(without_event(good, points[0]))[0]
    assert any("metric points" in each for each in faults_of(without_event(good, points[0])))
    assert any("its states were" in each for each in faults_of(without_event(good, -1)))
    assert any("attempts" in each for each in faults_of(replace(good, outcomes=("completed", "completed"))))
    assert any("ended COMPLETED" in each for each in faults_of(good, fate="fails"))
    assert list(check(History(runs={}), {"r": "completes"}, {"r": "gone"}, steps=STEPS)) == [
        "1 requests made 0 runs",
        "run gone is gone",
    ]


def without_event(each: RunHistory, index: int) -> RunHistory:
    events = list(each.events)
    del events[index]
    return replace(each, events=tuple(events))


def faults_of(each: RunHistory, fate: str = "completes") -> list[str]:
    history = History(runs={"a": each})
    return list(check(history, {"r": fate}, {"r": "a"}, steps=STEPS))
