"""lm-evaluation-harness asks a teacher over OpenAI's API, and finds what it finds in the model's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.client.web.conftest import start_web
from tests.conftest import Models
from tests.support.environments.harness import (
    QUESTIONS,
    accuracy,
    evaluated,
    likelihoods,
    make_harness,
    write_questions,
)
from tests.support.processes import no_process_left
from tests.support.programs import Program


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_harness_finds_the_same_over_openais_api_as_in_the_models_files(
    hf_teacher: Program, models: Models, tmp_path: Path
) -> None:
    python = make_harness(tmp_path / "harness")
    if isinstance(python, str):
        pytest.skip(python)
    questions = write_questions(tmp_path, models.texts)
    with (
        no_process_left() as mark,
        start_web(tmp_path, "127.0.0.1:1", "--teacher", hf_teacher.target, environment=mark) as web,
    ):
        served = evaluated(
            python,
            tmp_path / "served",
            questions,
            "local-completions",
            f"model={models.teacher},base_url={web.target}/v1/completions,tokenizer={models.teacher},num_concurrent=4",
        )
    local = evaluated(
        python, tmp_path / "local", questions, "hf", f"pretrained={models.teacher},dtype=float32"
    )
    ours, theirs = (likelihoods(each) for each in (served, local))
    assert len(ours) == len(theirs) > QUESTIONS
    assert ours == pytest.approx(theirs, abs=2e-4)
    assert accuracy(served) == accuracy(local)
