"""lm-evaluation-harness reads a pulled student, and scores choices as `stillhouse eval` does."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from stillhouse.client.api import Trainer
from tests.conftest import Models
from tests.support.runs import Service, completed

HARNESS = "lm_eval==0.4.13"
IMPORTED = ("pytablewriter", "sqlitedict", "more_itertools", "tenacity")
"""Imports of a local task and of a served model that this environment lacks; the harness never reaches scikit-learn and others."""
QUESTIONS = 24


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Future[Path | str]]:
    """The Python of an environment of its own, with the harness on top of this one's libraries, or why there is none.

    It is made beside the test's run, whose processes leave a core free.
    """
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(make_environment, tmp_path_factory.mktemp("harness"))


def make_environment(root: Path) -> Path | str:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root)], check=True, timeout=100)
    python = root / "bin" / "python"
    purelib = subprocess.check_output(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    (Path(purelib) / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for packages in (("--no-deps", HARNESS), IMPORTED):
        done = subprocess.run(
            [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", *packages],
            capture_output=True,
            check=False,
            timeout=200,
        )
        if done.returncode:
            return f"lm_eval cannot be installed here: {done.stderr.decode()[-200:]}"
    return python


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
    words = [text.split(": ")[1].split()[0] for text in models.texts[: 3 * QUESTIONS]]
    rows = [
        {"prompt": f"Number {each}:", "choices": [f" {word}" for word in options], "answer": each % 3}
        for each in range(QUESTIONS)
        if len(set(options := words[3 * each : 3 * each + 3])) == 3
    ]
    questions = tmp_path / "quiz.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
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
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    task = {
        "task": "quiz",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (tasks / "quiz.yaml").write_text(yaml.safe_dump(task))
    done = subprocess.run(
        [
            *(str(python), "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--tasks", "quiz"),
            *("--model_args", f"pretrained={tmp_path / 'student'},dtype=float32"),
            *("--include_path", str(tasks), "--output_path", str(tmp_path / "results"), "--batch_size", "1"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path / "hf"),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = (tmp_path / "results").rglob("results_*.json")
    theirs = json.loads(results.read_text())["results"]["quiz"]["acc,none"]
    assert theirs == pytest.approx(quiz["metrics"]["accuracy"]["after"]["value"], abs=1e-9)
    assert 0 < theirs < 1

    told = service.stillhouse("run", "attach", run.id, str(results))
    assert "evaluations/attached/" in told.stdout
    assert any(each.path.startswith("evaluations/attached/results_") for each in run.artifacts())
