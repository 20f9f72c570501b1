"""lm-evaluation-harness reads a pulled student, and scores choices as `stillhouse eval` does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from stillhouse.client.api import Trainer
from tests.conftest import Models
from tests.support.environments.harness import accuracy, evaluated, make_harness, write_questions
from tests.support.runs import Service, completed


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Path | str]]:
    """The Python of an environment of its own, with the harness on top of this one's libraries, or why there is none.

    It is made beside the test's run, whose processes leave a core free.
    """
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(make_harness, tmp_path_factory.mktemp("harness"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_harness_scores_a_pulled_student_as_we_do(
    *,
    harness: Future[Path | str],
    service: Service,
    trainer: Trainer,
    models: Models,
    dataset_file: Path,
    tmp_path: Path,
) -> None:
    questions = write_questions(tmp_path, models.texts)
    spec = {
        "student": {"model": str(models.student)},
        "data": {"train": [{"path": str(dataset_file)}]},
        "loss": {"terms": [{"weight": 0}], "hard_weight": 1},
        "optimizer": {"max_steps": 4, "micro_batch_size": 4, "learning_rate": 1e-2},
        "evaluation": {
            "sets": [{"name": "quiz", "path": str(questions), "match": "choices", "metrics": ["accuracy"]}]
        },
    }
    run = trainer.create_run(spec)
    completed(run, service)
    service.stillhouse("run", "pull", run.id, "--to", str(tmp_path / "student"))
    ours = service.stillhouse("eval", run.id, "--report", "--json")
    [quiz] = [each for each in json.loads(ours.stdout)["sets"] if each["name"] == "quiz"]

    python = harness.result()
    if isinstance(python, str):
        pytest.skip(python)
    results = evaluated(
        python, tmp_path / "harness", questions, "hf", f"pretrained={tmp_path / 'student'},dtype=float32"
    )
    theirs = accuracy(results)
    assert theirs == pytest.approx(quiz["metrics"]["accuracy"]["after"]["value"], abs=1e-9)
    assert 0 < theirs < 1

    told = service.stillhouse("run", "attach", run.id, str(results))
    assert "evaluations/attached/" in told.stdout
    assert any(each.path.startswith("evaluations/attached/results_") for each in run.artifacts())
