"""The age of rollouts where a run file leaves it out: a table of machines, settled once, when the run is created."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stillhouse.student_trainer.config.proto import from_proto
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.config.settled.matmul_dtype import Processor
from stillhouse.student_trainer.runs.api.spec_resolution import Host, resolve_devices
from stillhouse.student_trainer.runs.supervision.device_slots import DeviceSlots
from tests.student_trainer.config.specs import SMALLEST, spec_of

HERE, ELSEWHERE = "127.0.0.1:7400", "teacher.example:7400"


@pytest.mark.parametrize(
    ("gpus", "teacher", "student", "expected"),
    [
        ((), HERE, {}, 0),
        ((), ELSEWHERE, {}, 1),
        ((0,), HERE, {}, 1),
        ((), HERE, {"rollout_targets": [HERE]}, 1),
        ((), HERE, {"max_staleness": 3}, 3),
        ((), ELSEWHERE, {"max_staleness": 0}, 0),
    ],
)
def test_texts_are_older_only_where_another_processor_works_meanwhile(
    *, tmp_path: Path, gpus: tuple[int, ...], teacher: str, student: dict[str, Any], expected: int
) -> None:
    values = {
        **SMALLEST,
        "student": {"model": "org/student", "lora": {"rank": 4}},
        "teachers": [{"targets": [teacher]}],
        "contexts": [{"student": student, "loss": {"terms": [{"divergence": "reverse_kl"}]}}],
    }
    config = from_proto(spec_of(values))
    found = _created(config, tmp_path, gpus)
    assert found.contexts[0].student is not None
    assert found.contexts[0].student.max_staleness == expected
    # A host that takes the run over does not choose again.
    assert _created(found, tmp_path, (0,)).contexts == found.contexts


def _created(config: RunConfig, data_dir: Path, gpus: tuple[int, ...]) -> RunConfig:
    """The configuration on a host with these GPUs."""
    host = Host(
        data_dir=data_dir,
        roots=(),
        slots=DeviceSlots(gpus=gpus, cpu_slots=1),
        find_dataset=lambda _: None,
        find_webhook_host=str,
        tracker_problem=lambda _: None,
        processor=Processor(),
    )
    return resolve_devices(config, host)
