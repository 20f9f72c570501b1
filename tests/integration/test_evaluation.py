"""`stillhouse eval` and `run compare` against the real services: a run, its checkpoint, a model, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.client.api import Trainer
from tests.conftest import Models
from tests.student_trainer.train.classification.conftest import Encoders, class_spec, encoders
from tests.support.programs import Program
from tests.support.runs import Service, completed, small_spec

__all__ = ["encoders"]


@pytest.fixture(scope="module")
def trained(
    hf_teacher: Program, service: Service, trainer: Trainer, models: Models, dataset_file: Path
) -> str:
    """Id of a run of six steps with checkpoints and the best of them."""
    changes = {
        "checkpoint": {"every_steps": 3, "keep": 5},
        "evaluation": {
            "metrics": ["kl", "perplexity", "chrf"],
            "best_metric": "kl",
            "every_steps": 3,
            "limit": 8,
            "generation": {"max_new_tokens": 6},
        },
    }
    spec = small_spec(student=models.student, train=dataset_file, teacher=hf_teacher.target, changes=changes)
    handle = trainer.create_run(spec)
    completed(handle, service)
    return handle.id


def test_a_finished_run_is_evaluated_on_its_own_rows_and_compared_with_its_beginning(
    service: Service, trainer: Trainer, trained: str
) -> None:
    report = json.loads(service.stillhouse("eval", trained, "--json").stdout)
    own = json.loads(service.stillhouse("eval", trained, "--report", "--json").stdout)
    [mine], [of_run] = report["sets"], own["sets"]
    for name in ("kl", "perplexity", "chrf"):
        for subject in ("before", "after"):
            assert mine["metrics"][name][subject] == pytest.approx(of_run["metrics"][name][subject], rel=1e-5)
    assert mine["metrics"]["kl"]["change"]["high"] < 0
    assert mine["metrics"]["chrf"]["teacher"]["value"] is not None
    evaluation = trainer.run(report["run"])
    ended = evaluation.get()
    assert ended.spec.labels["of"] == trained
    assert (ended.progress.step, ended.progress.total_steps) == (2, 2)
    assert "shows its report" in service.stillhouse("run", "show", evaluation.id).stdout


def test_after_an_evaluation_the_latest_model_is_still_that_of_the_run(
    service: Service, trainer: Trainer, trained: str, tmp_path: Path
) -> None:
    again = json.loads(service.stillhouse("eval", trained, "--limit", "4", "--json").stdout)["run"]
    assert trainer.run("latest").id == again
    third = json.loads(service.stillhouse("eval", "latest", "--limit", "4", "--json").stdout)["run"]
    run = trainer.run(third).get()
    assert (run.spec.labels["of"], run.spec.display_name) == (trained, f"evaluation of {trained}")
    service.stillhouse("run", "pull", "latest", "--to", str(tmp_path / "student"))
    assert (tmp_path / "student" / "model.safetensors").is_file()
    assert service.stillhouse("eval", "latest", "--report").stdout.startswith("SET")
    refused = service.stillhouse("eval", again, expect=2).stderr
    assert f'run {again} has no model, as its task is "evaluate"; name a run that trains one.' in refused


def test_a_checkpoint_and_a_model_are_evaluated_on_rows_from_here(
    service: Service, trained: str, models: Models, dataset_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report.json"
    told = service.stillhouse(
        *(
            "eval",
            f"{trained}/checkpoints/3",
            "--data",
            str(dataset_file),
            "--against",
            "none",
            "--limit",
            "8",
        ),
        *("--metric", "perplexity", "--metric", "ece", "--baseline", "none", "--out", str(out)),
    )
    assert "perplexity" in told.stdout
    [held_out] = json.loads(out.read_text())["sets"]
    assert held_out["rows"] == 8
    assert set(held_out["metrics"]["perplexity"]) == {"after"}


def test_what_cannot_be_evaluated_is_one_sentence(service: Service, trained: str, models: Models) -> None:
    for arguments, code, sentence in (
        ((f"{trained}/checkpoints/4",), 2, "it has checkpoints/3, checkpoints/6"),
        (("some/model",), 2, "has no rows without it"),
        ((trained, "--set", "quiz"), 2, "write --set NAME=FILE"),
        (("latest/checkpoints/x", "--data", "datasets/none"), 2, ""),
    ):
        done = service.stillhouse("eval", *arguments, expect=code)
        assert sentence in done.stderr, done.stderr


def test_a_classifier_is_evaluated_in_its_own_run_alone(
    service: Service, trainer: Trainer, encoders: Encoders
) -> None:
    terms = {"terms": [{"divergence": "forward_kl", "weight": 0}], "hard_weight": 1}
    run = trainer.create_run(class_spec(encoders.student, encoders.rows, None, loss=terms))
    completed(run, service)
    refused = service.stillhouse("eval", run.id, expect=2).stderr
    assert f"run {run.id} trained a classifier" in refused
    assert "eval/accuracy" in service.stillhouse("run", "show", run.id).stdout
    assert "accuracy" in service.stillhouse("eval", run.id, "--report").stdout


def test_runs_are_compared_by_what_differs(
    *,
    service: Service,
    trainer: Trainer,
    trained: str,
    hf_teacher: Program,
    models: Models,
    dataset_file: Path,
) -> None:
    spec = small_spec(student=models.student, train=dataset_file, teacher=hf_teacher.target, steps=2)
    other = trainer.create_run(spec)
    completed(other, service)
    told = json.loads(service.stillhouse("run", "compare", trained, other.id, "--json").stdout)
    assert told["settings"]["optimizer.max_steps"] == ["6", "2"]
    assert "optimizer.learning_rate" not in told["settings"]
    first, second = told["metrics"]["eval/kl"]
    assert first < second
    assert told["metrics"]["eval/chrf"][1] is None
    table = service.stillhouse("run", "compare", trained, other.id).stdout
    assert "optimizer.max_steps" in table
    assert "eval/kl" in table
