"""Specs for tests of the run service, as a user would write them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config.proto import from_proto

SMALLEST: Mapping[str, Any] = {
    "student": {"model": "org/student"},
    "teachers": [{"targets": ["127.0.0.1:7401"]}],
    "data": {"train": [{"path": "rows.jsonl"}]},
}
"""Everything that is required, and nothing else."""
ALM: Mapping[str, Any] = {"foreign_tokenizer": "alm"}
"""Loss of a bridged run."""


def spec_of(values: Mapping[str, Any]) -> RunSpec:
    """The spec that a run file with these values gives."""
    return json_format.ParseDict(dict(values), RunSpec())


def changed(path: str, value: Any) -> RunSpec:
    """SMALLEST with `value` at `path`, such as "loss.top_k" or "teachers.0.targets"."""
    values: Any = copy.deepcopy(dict(SMALLEST))
    *parents, last = path.split(".")
    here = values
    for parent in parents:
        here = here[int(parent)] if isinstance(here, list) else here.setdefault(parent, {})
    here[int(last) if isinstance(here, list) else last] = value
    return spec_of(values)


def cross_entropy_spec(student: Path, train: Path, *, steps: int = 3, **optimizer: Any) -> RunSpec:
    """A run of a tiny student that asks no teacher."""
    return spec_of(
        {
            "student": {"model": str(student)},
            "data": {"train": [{"path": str(train)}], "max_sequence_tokens": 64, "eval_fraction": 0.1},
            "loss": {"terms": [{"weight": 0}], "hard_weight": 1},
            "optimizer": {"max_steps": steps, "micro_batch_size": 2, "learning_rate": 1e-3, **optimizer},
        }
    )


def violations(spec: RunSpec) -> dict[str, str]:
    """Description of each violation by field; fails if the spec is taken."""
    with pytest.raises(StillhouseError) as caught:
        from_proto(spec)
    assert caught.value.reason is Reason.INVALID_SPEC
    assert all(each.field in str(caught.value) for each in caught.value.violations)
    return {each.field: each.description for each in caught.value.violations}
