"""Teachers of a run: rules of bridged runs, mixtures, contexts and addresses."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.student_trainer.config.proto import from_proto
from tests.student_trainer.config.specs import ALM, SMALLEST, changed, spec_of, violations


@pytest.mark.parametrize(
    ("further", "field"),
    [
        ({"evaluation": {"metrics": ["kl"]}}, "evaluation.metrics"),
        ({"cache": {"path": "caches/a", "mode": "only"}}, "cache.mode"),
        ({"cache": {"path": "caches/a"}, "task": "cache"}, "task"),
        ({"teachers": [{"targets": ["a:1"], "name": "a"}, {"targets": ["b:1"], "name": "b"}]}, "teachers"),
    ],
)
def test_a_bridged_run_refuses_what_needs_one_vocabulary(further: dict[str, Any], field: str) -> None:
    assert set(violations(spec_of({**SMALLEST, "loss": ALM, **further}))) == {field}


def test_a_bridged_run_goes_with_hard_labels_and_has_its_own_metric() -> None:
    hard = {"dataset": {}, "loss": {"terms": [{"weight": 0}], "hard_weight": 1}}
    run = from_proto(spec_of({**SMALLEST, "loss": ALM, "contexts": [{"dataset": {}}, hard]}))
    assert run.evaluation.metrics == ("alm", "perplexity")
    assert run.loss.chunk_temperature == 100


def test_a_mixture_of_teachers_refuses_what_it_has_not() -> None:
    teachers = [{"targets": ["a:1"], "name": "a"}, {"targets": ["b:1"], "name": "b"}]
    values = {**SMALLEST, "teachers": teachers, "loss": {"temperature": 2}, "contexts": [{"teacher": {}}]}
    assert set(violations(spec_of(values))) == {"loss.temperature_mode", "contexts[0]"}
    routed = {**values, "data": {**SMALLEST["data"], "teacher_field": "category"}}
    assert from_proto(spec_of(routed)).teachers[1].name == "b"


def test_generated_contexts_need_a_teacher() -> None:
    loss = {"terms": [{"weight": 0}], "hard_weight": 1}
    values = {**SMALLEST, "teachers": [], "loss": loss, "contexts": [{"teacher": {}}]}
    assert "contexts[0]" in violations(spec_of(values))


def test_cross_entropy_alone_needs_no_teacher() -> None:
    values = {**SMALLEST, "teachers": [], "loss": {"terms": [{"weight": 0}], "hard_weight": 1}}
    run = from_proto(spec_of(values))
    assert not run.loss.asks_teacher
    assert run.evaluation.metrics == ("perplexity",)
    found = violations(spec_of({**values, "evaluation": {"metrics": ["kl"]}}))
    assert '"kl"' in found["teachers"]


@pytest.mark.parametrize("target", ["host:1", "10.0.0.1:7401", "[::1]:7401", "unix:/run/teacher.sock"])
def test_targets_that_are_addresses(target: str) -> None:
    assert from_proto(changed("teachers.0.targets", [target])).teachers[0].targets == (target,)
