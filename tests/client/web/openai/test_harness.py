"""lm-evaluation-harness asks a teacher over OpenAI's API, and finds what it finds in the model's files."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.client.web.conftest import start_web
from tests.conftest import Models
from tests.integration.test_harness import make_environment
from tests.support.processes import no_process_left
from tests.support.programs import Program

QUESTIONS = 24


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_harness_finds_the_same_over_openais_api_as_in_the_models_files(
    hf_teacher: Program, models: Models, tmp_path: Path
) -> None:
    python = make_environment(tmp_path / "harness")
    if isinstance(python, str):
        pytest.skip("lm_eval is not installed")
    questions = write_questions(tmp_path, models)
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
    scores = [json.loads(each.read_text())["results"]["quiz"]["acc,none"] for each in (served, local)]
    assert scores[0] == scores[1]


def write_questions(folder: Path, models: Models) -> Path:
    """A file of questions with three choices each."""
    words = [text.split(": ")[1].split()[0] for text in models.texts[: 3 * QUESTIONS]]
    rows = [
        {"prompt": f"Number {each}:", "choices": [f" {word}" for word in options], "answer": each % 3}
        for each in range(QUESTIONS)
        if len(set(options := words[3 * each : 3 * each + 3])) == 3
    ]
    path = folder / "quiz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluated(python: Path, folder: Path, questions: Path, model: str, arguments: str) -> Path:
    """The file with the harness's results for a model."""
    tasks = folder / "tasks"
    tasks.mkdir(parents=True)
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
            *(str(python), "-m", "lm_eval", "--model", model, "--tasks", "quiz", "--model_args", arguments),
            *("--include_path", str(tasks), "--output_path", str(folder / "results"), "--batch_size", "1"),
            *("--log_samples", "--device", "cpu"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(folder),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hf"),
            "OPENAI_API_KEY": "none",
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = (folder / "results").rglob("results_*.json")
    return results


def likelihoods(results: Path) -> list[float]:
    """The log-likelihood of each choice, in the order of the questions."""
    [samples] = results.parent.glob("samples_*.jsonl")
    rows = sorted(
        (json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"]
    )
    return [float(choice[0][0]) for row in rows for choice in row["resps"]]
