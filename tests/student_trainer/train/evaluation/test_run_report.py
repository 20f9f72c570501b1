"""The report of a run compares evaluations of the same rows alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stillhouse.protos.evaluation.report import PLACE
from stillhouse.protos.evaluation.row_sums import RowSums
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.evaluation.evaluator import Evaluation
from stillhouse.student_trainer.train.evaluation.run_report import RunReport


def _evaluation(num_rows: int) -> Evaluation:
    return Evaluation(
        metrics={}, student={"": {"kl": RowSums.mean(np.arange(1, num_rows + 1, dtype=np.float64))}}
    )


@pytest.mark.parametrize(("num_rows", "subjects"), [(4, {"before", "after", "change"}), (3, {"after"})])
def test_a_first_evaluation_of_other_rows_is_left_out(
    tmp_path: Path, num_rows: int, subjects: set[str]
) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.path.mkdir()
    with run_dir.open_attempt(1) as attempt:
        report = RunReport(attempt, {})
        report.keep("before", 0, _evaluation(4))
        report.keep("after", 5, _evaluation(num_rows))
        report.write(5)
    (found,) = json.loads((run_dir.path / PLACE).read_bytes())["sets"]
    assert set(found["metrics"]["kl"]) == subjects
