"""Changes of a resumed run: passes, checkpoints, retries and devices are changed, anything that is learnt is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import json_format

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config import schema
from stillhouse.student_trainer.config.checks import walk
from stillhouse.student_trainer.config.proto import from_proto, to_proto
from stillhouse.student_trainer.config.resume_changes import CHANGEABLE, changed_spec
from tests.student_trainer.config.specs import SMALLEST, spec_of


def effective(**optimizer: Any) -> RunSpec:
    return to_proto(from_proto(spec_of({**SMALLEST, "optimizer": optimizer})))


def after(changes: dict[str, Any], **optimizer: Any) -> dict[str, Any]:
    found = changed_spec(effective(**optimizer), spec_of(changes))
    values: dict[str, Any] = json_format.MessageToDict(found, preserving_proto_field_name=True)
    return values


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({"micro_batch_size": 2}, (2, 8)),
        ({"micro_batch_size": 16}, (16, 1)),
        ({"grad_accum_steps": 4}, (4, 4)),
        ({"micro_batch_size": 1, "grad_accum_steps": 16}, (1, 16)),
    ],
)
def test_an_update_keeps_its_rows(changes: dict[str, int], passes: tuple[int, int]) -> None:
    optimizer = after({"optimizer": changes}, micro_batch_size=8, grad_accum_steps=2)["optimizer"]
    assert (optimizer["micro_batch_size"], optimizer["grad_accum_steps"]) == passes


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"micro_batch_size": 3}, "one of 1, 2, 4, 8, 16"),
        ({"grad_accum_steps": 32}, "one of 1, 2, 4, 8, 16"),
        ({"micro_batch_size": 8, "grad_accum_steps": 1}, "the 16 rows of an update"),
        ({"micro_batch_size": 0}, "one of 1, 2"),
        ({"micro_batch_size": -8, "grad_accum_steps": -2}, "out of range"),
    ],
)
def test_other_rows_of_an_update_are_refused(changes: dict[str, int], limit: str) -> None:
    with pytest.raises(StillhouseError, match=limit) as caught:
        after({"optimizer": changes}, micro_batch_size=8, grad_accum_steps=2)
    assert caught.value.reason is Reason.INVALID_SPEC


def test_passes_by_tokens_take_tokens_and_those_by_rows_either() -> None:
    changed = changed_spec(effective(batch_size=6), spec_of({"optimizer": {"micro_batch_tokens": 512}}))
    assert (changed.optimizer.batch_size, changed.optimizer.micro_batch_tokens) == (6, 512)
    by_rows = effective(micro_batch_size=4, grad_accum_steps=3)
    changed = changed_spec(by_rows, spec_of({"optimizer": {"micro_batch_tokens": 512}}))
    assert (changed.optimizer.batch_size, changed.optimizer.micro_batch_tokens) == (12, 512)
    assert not changed.optimizer.HasField("micro_batch_size")
    for before, asked in ((effective(), {}), (by_rows, {"micro_batch_tokens": 512})):
        with pytest.raises(StillhouseError, match="micro_batch_tokens alone") as caught:
            changed_spec(before, spec_of({"optimizer": {"micro_batch_size": 2, **asked}}))
        assert caught.value.violations[0].field == "optimizer.micro_batch_size"


def test_checkpoints_retries_devices_and_memory_are_changed() -> None:
    changes = spec_of(
        {
            "checkpoint": {"every_seconds": 60, "keep": 5},
            "retry": {"halve_micro_batch": True, "teacher_wait_s": 0},
            "resources": {"gpus": [2, 3]},
            "student": {"gradient_checkpointing": True},
        }
    )
    expected = effective()
    expected.MergeFrom(changes)
    assert changed_spec(effective(), changes) == expected


def test_devices_of_one_kind_replace_those_of_the_other() -> None:
    spec = changed_spec(effective(), spec_of({"resources": {"gpu_count": 2}}))
    named = changed_spec(spec, spec_of({"resources": {"gpus": [1]}}))
    assert (list(named.resources.gpus), named.resources.HasField("gpu_count")) == ([1], False)
    counted = changed_spec(named, spec_of({"resources": {"gpu_count": 0, "num_processes": 2}}))
    assert (list(counted.resources.gpus), counted.resources.gpu_count) == ([], 0)
    assert counted.resources.num_processes == 2


def test_everything_else_is_refused_by_name() -> None:
    changes = spec_of(
        {
            "optimizer": {"precision": "bf16", "learning_rate": 1e-3},
            "data": {"max_sequence_tokens": 64, "train": [{"path": "other.jsonl"}]},
            "teachers": [{"targets": ["other:7401"]}],
            "student": {"gradient_checkpointing": True, "lora": {}},
            "labels": {"who": "me"},
        }
    )
    with pytest.raises(StillhouseError, match="create a new run") as caught:
        changed_spec(effective(), changes)
    assert [each.field for each in caught.value.violations] == [
        *("student.lora", "teachers", "data.train", "data.max_sequence_tokens"),
        *("optimizer.learning_rate", "optimizer.precision", "labels"),
    ]
    assert "optimizer.micro_batch_tokens" in caught.value.violations[0].description


def test_what_may_change_exists() -> None:
    known = {path for path, _, _ in walk(schema.RunConfig())}
    assert set(CHANGEABLE) <= known


def test_a_resume_takes_a_number_for_the_tokens_of_a_pass_and_not_auto() -> None:
    with pytest.raises(StillhouseError, match="Give tokens of a pass, such as 2048") as caught:
        changed_spec(effective(), spec_of({"optimizer": {}}))
    assert caught.value.violations[0].field == "optimizer.micro_batch_tokens"
