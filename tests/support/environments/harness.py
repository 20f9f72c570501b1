"""lm-evaluation-harness in an environment of its own, and a small task of multiple choice for it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import yaml

from tests.support.environments.overlay import make_environment

HARNESS = "lm_eval==0.4.13"
IMPORTED = ("pytablewriter", "sqlitedict", "more_itertools", "tenacity")
"""Imports of a local task and of a served model that this environment lacks; the harness never reaches scikit-learn and others."""
QUESTIONS = 24
TASK = {
    "task": "quiz",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{prompt}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}


def make_harness(root: Path) -> Path | str:
    """The Python of an environment with the harness, or why there is none."""
    made = make_environment(root, ("--no-deps", HARNESS), IMPORTED)
    return made if isinstance(made, str) else made.python


def write_questions(folder: Path, texts: Sequence[str]) -> Path:
    """A file of questions with three choices each."""
    words = [text.split(": ")[1].split()[0] for text in texts[: 3 * QUESTIONS]]
    rows = [
        {"prompt": f"Number {each}:", "choices": [f" {word}" for word in options], "answer": each % 3}
        for each in range(QUESTIONS)
        if len(set(options := words[3 * each : 3 * each + 3])) == 3
    ]
    path = folder / "quiz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluated(python: Path, folder: Path, questions: Path, model: str, arguments: str) -> Path:
    """The file with the harness's results for a model, its samples beside it."""
    tasks = folder / "tasks"
    tasks.mkdir(parents=True)
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(questions)}}}
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


def accuracy(results: Path) -> float:
    """The share of questions that were answered rightly."""
    return float(json.loads(results.read_text())["results"]["quiz"]["acc,none"])


def likelihoods(results: Path) -> list[float]:
    """The log-likelihood of each choice, in the order of the questions."""
    [samples] = results.parent.glob("samples_*.jsonl")
    rows = sorted(
        (json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"]
    )
    return [float(choice[0][0]) for row in rows for choice in row["resps"]]
