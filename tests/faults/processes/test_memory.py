"""A training process that the kernel kills for memory: the run says so, with advice, and its service lives on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.protos.errors import Reason, from_status
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from tests.conftest import Models
from tests.student_trainer.config.specs import cross_entropy_spec
from tests.student_trainer.runs.api.caller import stub_for, wait_ended
from tests.support.privileges import memory_limited
from tests.support.programs import Program

LIMIT_BYTES = 120 * 2**20
"""Room for the service, and not for a process that imports torch."""


@pytest.mark.faults(row=8)
@pytest.mark.slow
def test_a_process_killed_for_memory_is_told_from_others_and_advice_is_given(
    trainer_service: Callable[..., Program], models: Models, dataset_file: Path
) -> None:
    service = trainer_service()
    with memory_limited(service.pid, LIMIT_BYTES), stub_for(service.target) as stub:
        spec = cross_entropy_spec(models.student, dataset_file, steps=5)
        name = stub.CreateRun(pb.CreateRunRequest(spec=spec)).name
        run = wait_ended(stub, name)
    assert run.state == Run.STATE_FAILED
    assert [(attempt.exit_code, attempt.signal) for attempt in run.attempts] == [(137, 9)]
    error = from_status(run.error)
    assert error.reason is Reason.OUT_OF_MEMORY, error.message
    for advice in (
        "micro_batch_size",
        "grad_accum_steps",
        "gradient_checkpointing",
        "quantization",
        "memory",
    ):
        assert advice in error.message
    with stub_for(service.target) as stub:
        stub.ResumeRun(pb.ResumeRunRequest(name=name))
        assert wait_ended(stub, name).state == Run.STATE_COMPLETED
