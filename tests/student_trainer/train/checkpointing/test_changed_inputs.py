"""A resume that meets other files than its run began with: another student is refused, other rows are told."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

from structlog.testing import capture_logs

from stillhouse.student_trainer.run_dir import EXIT_FAILED
from stillhouse.student_trainer.train.process import failpoints
from tests.conftest import Models
from tests.student_trainer.train.runs import failure, finish, finish_here, make_run, spec_of
from tests.support.processes import no_process_left
from tests.support.programs import Program

OTHERS = "the rows are others than those that this run began with"


def test_other_files_than_at_the_beginning_do_not_go_on_in_silence(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    student, rows = tmp_path / "student", tmp_path / "rows.jsonl"
    shutil.copytree(models.student, student)
    shutil.copy(dataset_file, rows)
    spec = spec_of(
        student, rows, hf_teacher.target, optimizer={"max_steps": 4}, checkpoint={"every_steps": 1}
    )
    run_dir = make_run(tmp_path, "run", spec)
    with no_process_left() as mark:
        killed = {**mark, failpoints.VARIABLE: "checkpoint.before_rename:3"}
        assert finish(run_dir, 1, killed) == -signal.SIGKILL

    config = student / "config.json"
    own = config.read_text()
    config.write_text(json.dumps(json.loads(own) | {"rms_norm_eps": 0.5}))
    assert finish_here(run_dir, 2) == EXIT_FAILED
    told = failure(run_dir)
    assert "is not the model that this run began with: the rms_norm_eps of its config.json is 0.5" in told
    config.write_text(own)

    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(reversed(lines)))
    with capture_logs() as logs:
        assert finish_here(run_dir, 3) == 0
    assert sum(str(each["event"]).startswith(OTHERS) for each in logs) == 1
