"""Presets fill what a run does not write, and nothing else."""

from __future__ import annotations

from google.protobuf.json_format import ParseDict

from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config.presets import PRESETS
from stillhouse.student_trainer.config.proto import from_proto, to_proto
from stillhouse.student_trainer.config.schema import RunConfig


def config(preset: str, **fields: object) -> RunConfig:
    spec = {
        "preset": preset,
        "student": {"model": "m"},
        "teachers": [{"targets": ["h:1"]}],
        "data": {"train": [{"path": "datasets/x"}]},
    }
    return from_proto(ParseDict(spec | fields, RunSpec()))


def test_system0_has_the_values_of_its_task_form() -> None:
    found = config("system0")
    assert found.student.lora is not None
    assert (found.student.lora.rank, found.student.lora.target_modules) == (16, ("q_proj", "v_proj"))
    assert (found.loss.temperature, found.loss.hard_weight, found.loss.terms[0].weight) == (3.0, 0.3, 0.7)
    assert (found.optimizer.epochs, found.optimizer.batch_size) == (10, 64)
    assert (found.optimizer.learning_rate, found.optimizer.weight_decay) == (1e-4, 0.01)
    assert (found.optimizer.lr_scheduler, found.checkpoint.every_epochs) == ("cosine", 5)


def test_system4_has_the_values_of_its_recipe() -> None:
    found = config("system4")
    assert (found.student.lora, found.student.gradient_checkpointing) == (None, True)
    assert (found.loss.temperature, found.loss.hard_weight, found.loss.terms[0].weight) == (2.0, 0.5, 0.5)
    assert (found.optimizer.epochs, found.optimizer.batch_size) == (3, 16)
    assert found.optimizer.learning_rate == 5e-5


def test_what_a_run_writes_stands() -> None:
    found = config(
        "system0",
        loss={"terms": [{"divergence": "jsd"}], "temperature": 1.0},
        optimizer={"micro_batch_size": 4, "grad_accum_steps": 2, "max_steps": 7},
        checkpoint={"every_steps": 3},
    )
    assert [(each.divergence, each.weight) for each in found.loss.terms] == [("jsd", 1.0)]
    assert (found.loss.temperature, found.loss.hard_weight) == (1.0, 0.3)
    assert (found.optimizer.micro_batch_size, found.optimizer.max_steps) == (4, 7)
    assert (found.checkpoint.every_steps, found.checkpoint.every_epochs) == (3, None)


def test_an_effective_spec_with_a_preset_reads_the_same_again() -> None:
    for preset in PRESETS:
        found = config(preset)
        assert from_proto(to_proto(found)) == found


def test_no_preset_changes_nothing() -> None:
    found = config("none")
    assert found.student.lora is None
    assert (found.loss.temperature, found.loss.hard_weight) == (1.0, 0.0)
