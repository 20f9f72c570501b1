"""`stillhouse run show` tells the targets that `auto` became, and the layers of hidden states."""

from __future__ import annotations

from stillhouse.client.commands.run.show import _facts
from stillhouse.protos.stillhouse.v1.run_pb2 import Run


def test_a_run_shows_its_targets_with_their_reason() -> None:
    run = Run(name="runs/aaaaaaaaaaaa")
    run.effective_spec.loss.sparse_target = "stratified_tail"
    assert "target" not in dict(_facts(run))
    run.effective_spec.loss.sparse_target_reason = "the teacher draws"
    run.effective_spec.loss.top_k, run.effective_spec.loss.num_samples = 16, 90
    run.effective_spec.contexts.add().student.SetInParent()
    assert dict(_facts(run))["target"] == "stratified_tail, top-16 and 90 draws: the teacher draws"


def test_a_run_shows_the_layers_that_it_compares() -> None:
    run = Run(name="runs/aaaaaaaaaaaa")
    hidden = run.effective_spec.loss.hidden_mse
    hidden.layers.add(teacher=2, student=1)
    hidden.layers.add(teacher=4, student=2)
    assert "layers" not in dict(_facts(run))
    hidden.layers_reason = "spread evenly"
    assert dict(_facts(run))["layers"] == "student's 1 with 2, 2 with 4 of the teacher: spread evenly"
