"""Answers of a teacher that never end are refused by runs and by the client, before they fill the memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.client.api import Teacher
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.run_dir import EXIT_FAILED
from tests.conftest import Models
from tests.student_trainer.train.runs import failure, finish_here, make_run, spec_of
from tests.support.networks.endless_teacher import Change, EndlessTeacher, without_end, without_rows
from tests.support.programs import Program

pytestmark = pytest.mark.model
FLOAT32 = {"logprob_dtype": "float32"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [(without_end, "at most [0, "), (without_rows, "a part without rows")],
    ids=["rows", "none"],
)
def test_endless_rows_end_a_run(
    change: Change, sentence: str, *, models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    with EndlessTeacher(hf_teacher.target, change) as teacher:
        spec = spec_of(models.student, dataset_file, teacher.target)
        spec["teachers"] = [{"targets": [teacher.target], **FLOAT32}]
        run_dir = make_run(tmp_path, "endless", spec)
        assert finish_here(run_dir) == EXIT_FAILED
    assert sentence in failure(run_dir)


@pytest.mark.parametrize("change", [without_end, without_rows], ids=["tokens", "none"])
def test_endless_texts_end_a_run(
    change: Change, *, models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    with EndlessTeacher(hf_teacher.target, change) as teacher:
        spec = spec_of(models.student, dataset_file, teacher.target)
        spec["teachers"] = [{"targets": [teacher.target], **FLOAT32}]
        spec["contexts"] = [{"teacher": {"generation": {"max_new_tokens": 4}}}]
        spec["evaluation"] = {"metrics": ["perplexity"]}
        run_dir = make_run(tmp_path, "endless", spec)
        assert finish_here(run_dir) == EXIT_FAILED
    assert "of one sample, at most 4 were asked for" in failure(run_dir)


def score(teacher: Teacher) -> None:
    list(teacher.score([("a", [5, 7, 11, 13])], top_k=4))


def complete(teacher: Teacher) -> None:
    list(teacher.complete(["a"], max_new_tokens=4))


@pytest.mark.parametrize("change", [without_end, without_rows], ids=["rows", "none"])
@pytest.mark.parametrize("call", [score, complete])
def test_the_client_refuses_what_does_not_end(
    change: Change, call: Callable[[Teacher], None], hf_teacher: Program
) -> None:
    with (
        EndlessTeacher(hf_teacher.target, change) as proxy,
        Teacher(proxy.target) as teacher,
        pytest.raises(StillhouseError) as refused,
    ):
        call(teacher)
    assert refused.value.reason is Reason.TENSOR_INVALID, refused.value
