"""The learning rate's shape, what is decayed, and when things are due."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stillhouse.student_trainer.config.resources import CheckpointConfig
from stillhouse.student_trainer.config.schema import EvaluationConfig, OptimizerConfig
from stillhouse.student_trainer.train.checkpointing.triggers import Triggers
from stillhouse.student_trainer.train.data.schedule import Schedule
from stillhouse.student_trainer.train.optim import clip_gradients, learning_rate, make_optimizer


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("cosine", [0.5, 1.0, 1.0, 0.9330127, 0.75, 0.5, 0.25, 0.0669873]),
    ],
)
def test_learning_rate_rises_then_takes_its_shape(shape: str, expected: list[float]) -> None:
    config = OptimizerConfig(learning_rate=1.0, lr_scheduler=shape, warmup_fraction=0.25)
    assert [learning_rate(step, 8, config) for step in range(8)] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_norms_and_biases_are_not_decayed(name: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    config = OptimizerConfig(name=name, weight_decay=0.5, learning_rate=0.1)
    optimizer = make_optimizer(dict(model.named_parameters()), config)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert changed == {"0.weight"}


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_an_update_on_a_cpu_is_one_pass_and_equals_torchs_own(name: str) -> None:
    config = OptimizerConfig(name=name, weight_decay=0.1, learning_rate=0.1)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 1000).view(10, 100)) for _ in range(2))
    optimizer = make_optimizer({"weight": ours}, config)
    assert all(group["fused"] for group in optimizer.param_groups)
    make = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[name]
    plain = make([theirs], lr=0.1, weight_decay=0.1)
    for step in range(5):
        for each in (ours, theirs):
            each.grad = torch.sin(torch.arange(1000.0).view(10, 100) * (step + 1))
        optimizer.step()
        plain.step()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("limit", "expected"), [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
def test_clipping_scales_down_to_the_limit(limit: float, expected: float) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([parameter], limit) == pytest.approx(5.0)
    assert parameter.grad.norm().item() == pytest.approx(expected, rel=1e-5)


def test_checkpoints_fall_due_by_steps_epochs_and_time() -> None:
    schedule = Schedule(num_rows=10, rows_per_step=4, num_taken=40, seed=0)

    def due(checkpoint: CheckpointConfig) -> list[int]:
        rhythm = Triggers(checkpoint, EvaluationConfig(), schedule)
        return [step for step in range(1, schedule.total_steps + 1) if rhythm.should_save(step)]

    assert due(CheckpointConfig(every_steps=4)) == [4, 8]
    assert due(CheckpointConfig(every_epochs=1.0)) == [3, 5, 8, 10]
    assert due(CheckpointConfig(every_epochs=0.5)) == [2, 3, 4, 5, 7, 8, 9, 10]
    assert due(CheckpointConfig(every_seconds=1e-9)) == list(range(1, 11))
    assert due(CheckpointConfig(every_seconds=1e9)) == []
