"""Adoption of attempts that an earlier service began."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.runs.data_dir import DataDir
from stillhouse.student_trainer.runs.store.store import Store
from tests.student_trainer.config.specs import SMALLEST, spec_of
from tests.student_trainer.runs.api.caller import stub_for, wait_ended
from tests.support.processes import no_process_left
from tests.support.programs import start_trainer


@pytest.mark.parametrize("with_log", [False, True])
def test_a_run_whose_process_was_never_started_is_queued_again(with_log: bool, tmp_path: Path) -> None:
    """State after a kill of the service between the store's commit and the start of the process."""
    data_dir = DataDir.open(tmp_path / "data")
    store = Store.open(data_dir.database_path)
    spec = spec_of(SMALLEST)
    store.create("aaaaaaaaaaaa", spec, spec, request_id="", version="1")
    attempt = store.begin_attempt("aaaaaaaaaaaa", ())
    store.close()
    if with_log:
        log = RunDir.create(data_dir.runs_path / "aaaaaaaaaaaa", spec, spec).log_path(attempt)
        log.parent.mkdir()
        log.touch()
    data_dir.close()
    with (
        no_process_left() as mark,
        start_trainer(
            tmp_path / "data",
            directory=tmp_path,
            options=["--cpu-slots", "0", "--gpus", ""],
            environment=mark,
        ) as program,
        stub_for(program.target) as stub,
    ):
        run = wait_ended(stub, "runs/aaaaaaaaaaaa")
    assert "--cpu-slots" in run.error.message  # it waited for a slot, and there is none
    assert list(run.attempts) == []
