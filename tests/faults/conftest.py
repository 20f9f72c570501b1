"""Fixtures shared by the tests of disturbed distillations."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.student_trainer.run_dir import RunDir
from tests.conftest import Models
from tests.student_trainer.train.runs import finish_here, make_run
from tests.support.programs import Program


@pytest.fixture(scope="module")
def undisturbed(
    request: pytest.FixtureRequest,
    models: Models,
    dataset_file: Path,
    hf_teacher: Program,
    tmp_path_factory: pytest.TempPathFactory,
) -> RunDir:
    """The run of the module's `spec` that nothing happened to; its teacher is on this machine."""
    spec = request.module.spec(models, dataset_file, hf_teacher.target)
    run_dir = make_run(tmp_path_factory.mktemp("calm"), "calm", spec)
    assert finish_here(run_dir) == 0
    return run_dir
