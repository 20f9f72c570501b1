"""CPU threads of a training process: passive by default, and one fewer where a service beside it computes too."""

from __future__ import annotations

from typing import Any

import pytest

from stillhouse.protos.telemetry.host_cores import usable_cores
from stillhouse.student_trainer.config.proto import from_proto
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.config.settled.cpu_threads import (
    PASSIVE_WAITING,
    has_teacher_beside,
    yield_cores,
)
from tests.student_trainer.config.specs import SMALLEST, spec_of

HARD = {"terms": [{"weight": 0}], "hard_weight": 1}
ADAPTER = {"model": "org/student", "lora": {}}
SAMPLED_BESIDE = {"rollout_targets": ["localhost:7403"]}
OFFLINE = {"path": "caches/x", "mode": "only"}


def config(*targets: str, **fields: Any) -> RunConfig:
    return from_proto(spec_of({**SMALLEST, "teachers": [{"targets": list(targets)}], **fields}))


@pytest.mark.parametrize(
    ("found", "beside"),
    [
        (config("127.0.0.1:7401"), True),
        (config("gpu-host:7401", "[::1]:7401"), True),
        (config("unix:/run/teacher"), True),
        (config("gpu-host:7401"), False),
        (config("localhost:7401", loss=HARD), False),
        (config("localhost:7401", cache=OFFLINE), False),
        (config("localhost:7401", loss=HARD, contexts=[{"teacher": {}}]), True),
        (config("gpu-host:7401", student=ADAPTER, contexts=[{"student": SAMPLED_BESIDE}]), True),
        (config("localhost:7401", contexts=[{"student": {}}]), False),
        (config("localhost:7401", contexts=[{"student": {"max_staleness": 1}}]), True),
        (config("localhost:7401", contexts=[{"student": {}}, {"dataset": {}}]), True),
    ],
)
def test_a_teacher_on_loopback_is_beside_the_run(found: RunConfig, beside: bool) -> None:
    assert has_teacher_beside(found) is beside


def test_threads_are_set_where_nobody_has() -> None:
    cores = usable_cores()
    alone: dict[str, str] = {"CUDA_VISIBLE_DEVICES": ""}
    yield_cores(config("gpu-host:7401"), alone)
    assert alone == {"CUDA_VISIBLE_DEVICES": "", **PASSIVE_WAITING, "OMP_NUM_THREADS": str(cores)}
    shared: dict[str, str] = {}
    yield_cores(config("localhost:7401"), shared)
    assert shared == {**PASSIVE_WAITING, "OMP_NUM_THREADS": str(max(1, cores - 1))}
    unusable = {"OMP_NUM_THREADS": ""}
    yield_cores(config("localhost:7401"), unusable)
    assert unusable == shared
    for given in ({"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "ACTIVE"}, {"CUDA_VISIBLE_DEVICES": "0"}):
        kept = dict(given)
        yield_cores(config("localhost:7401"), kept)
        assert kept.items() >= given.items()
        assert ("KMP_BLOCKTIME" in kept) is ("CUDA_VISIBLE_DEVICES" not in given)
