"""A run that ran out of memory continues with half its micro-batch, once, with the same steps."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stillhouse.protos.errors import Reason, from_status
from stillhouse.protos.stillhouse.v1 import run_pb2 as pb
from stillhouse.protos.stillhouse.v1.run_pb2 import Run
from stillhouse.student_trainer.config.schema import OptimizerConfig, RunConfig
from stillhouse.student_trainer.config.settled.micro_batch import (
    HALVE_VARIABLE,
    auto_tokens,
    smaller_micro_batch,
)
from tests.conftest import Models
from tests.student_trainer.config.specs import cross_entropy_spec
from tests.student_trainer.runs.api.caller import stub_for, wait_ended, wait_step
from tests.support.programs import Program


@pytest.mark.parametrize(
    ("size", "steps", "smaller"),
    [
        (8, 1, (4, 2)),
        (4, 3, (2, 6)),
        (2, 1, (1, 2)),
        (6, 1, (3, 2)),
        (5, 1, (1, 5)),
        (5, 2, (2, 5)),
        (1, 4, None),
    ],
)
def test_a_step_has_as_many_sequences_as_before(
    size: int, steps: int, smaller: tuple[int, int] | None
) -> None:
    config = RunConfig(optimizer=OptimizerConfig(micro_batch_size=size, grad_accum_steps=steps))
    found = smaller_micro_batch(config)
    if smaller is None:
        assert found is None
    else:
        optimizer = replace(config.optimizer, micro_batch_size=smaller[0], grad_accum_steps=smaller[1])
        assert found == replace(config, optimizer=optimizer)


def test_a_pass_that_is_cut_by_tokens_has_half_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(tokens: int | None) -> RunConfig | None:
        return smaller_micro_batch(RunConfig(optimizer=OptimizerConfig(micro_batch_tokens=tokens)))

    assert halved(1000) == RunConfig(optimizer=OptimizerConfig(micro_batch_tokens=500))
    assert halved(1) is None
    assert halved(None) == RunConfig()
    whole = auto_tokens("gpu")
    monkeypatch.setenv(HALVE_VARIABLE, "1")
    assert auto_tokens("gpu") == whole // 2


@pytest.mark.model
@pytest.mark.faults(row=8)
def test_a_killed_run_is_halved_once_and_then_fails_with_advice(
    trainer_service: Callable[..., Program],
    models: Models,
    dataset_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data_dir = tmp_path / "trainer-data"
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    monkeypatch.setenv("OMP_DISPLAY_ENV", "TRUE")

    def kill(name: str) -> None:
        process = json.loads((data_dir / name / "process.json").read_text())
        os.kill(process["pid"], signal.SIGKILL)

    with stub_for(trainer_service("--stop-grace-s", "1").target) as stub:
        spec = cross_entropy_spec(models.student, dataset_file, steps=1_000_000)
        spec.optimizer.micro_batch_size = 4
        spec.retry.halve_micro_batch = True
        name = stub.CreateRun(pb.CreateRunRequest(spec=spec)).name
        wait_step(stub, name, 2)
        kill(name)
        log = (data_dir / name / "attempts/1/log").read_text()
        assert "OMP_WAIT_POLICY = 'PASSIVE'" in log, "set before torch loads OpenMP"
        wait_step(stub, name, 2, attempt=2)
        assert '"micro_batch_size": 2' in (data_dir / name / "attempts/2/log").read_text()
        kill(name)
        run = wait_ended(stub, name)
    assert (run.state, len(run.attempts)) == (Run.STATE_FAILED, 2)
    assert [attempt.exit_code for attempt in run.attempts] == [137, 137]
    error = from_status(run.error)
    assert error.reason in (Reason.PROCESS_DIED, Reason.OUT_OF_MEMORY)
    assert "optimizer.micro_batch_size" in error.message
    assert run.effective_spec.optimizer.micro_batch_size == 4
