"""Examples in a run's directory: at each evaluation, whose KL is theirs, once each also after a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.protos.evaluation.examples import FOLDER, INDEX, place_of
from stillhouse.student_trainer.run_dir import RunDir
from tests.conftest import Models
from tests.student_trainer.train.runs import finish_here, metric, spec_of
from tests.support.programs import Program

Train = Callable[..., RunDir]


def index_of(run_dir: RunDir) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run_dir.path / INDEX).read_bytes())["evaluations"]
    return found


def document_of(run_dir: RunDir, step: int) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((run_dir.path / place_of(step)).read_bytes())
    return document


def test_examples_have_the_evaluations_kl_and_text(
    models: Models, dataset_file: Path, hf_teacher: Program, run: Train
) -> None:
    evaluation = {
        "every_steps": 2,
        "limit": 3,
        "sets": [{"name": "few", "path": str(dataset_file), "limit": 9}],
    }
    stops = iter([False] * 5 + [True] * 100)
    spec = spec_of(
        models.student, dataset_file, hf_teacher.target, evaluation=evaluation, optimizer={"max_steps": 6}
    )
    stopped = run(spec, stopped=lambda: next(stops))
    assert finish_here(stopped, 2) == 0
    entries = index_of(stopped)
    assert [(each["step"], each["subject"]) for each in entries] == [
        (0, "before"),
        (2, "along"),
        (4, "along"),
        (6, "after"),
    ]
    assert {each.name for each in (stopped.path / FOLDER).iterdir()} == {
        "0.json",
        "2.json",
        "4.json",
        "6.json",
        "index.json",
    }
    for step in (0, 6):
        document = document_of(stopped, step)
        assert [(each["set"], each["number"]) for each in document["rows"]] == [
            ("", 0),
            ("few", 0),
            ("", 1),
            ("few", 1),
            ("", 2),
            ("few", 2),
            ("few", 3),
        ]
        own = [target["kl"] for each in document["rows"] if not each["set"] for target in each["targets"]]
        # All held-out rows are among the examples.
        assert sum(own) / len(own) == pytest.approx(metric(stopped, "eval/kl")[step], abs=1e-4)
        for each in document["rows"]:
            assert len(each["texts"]) == len(each["tokens"])
            assert {"at", "kl", "top", "teacher_logprob", "teacher_tail"} <= each["targets"][0].keys()
        assert document["teacher_top_k"] == 32
        assert not document["from_cache"]
    rows = [json.loads(line) for line in dataset_file.read_text().splitlines()]
    first = document_of(stopped, 6)["rows"][1]
    assert "".join(first["texts"]).startswith(rows[0]["prompt"] + rows[0]["completion"])


def test_a_run_without_teacher_has_the_students_alone(models: Models, dataset_file: Path, run: Train) -> None:
    loss = {"terms": [{"weight": 0}], "hard_weight": 1}
    spec = spec_of(models.student, dataset_file, None, loss=loss, optimizer={"max_steps": 1})
    document = document_of(run(spec), 1)
    target = document["rows"][0]["targets"][0]
    assert "kl" not in target
    assert target["student_logprob"] < 0
    assert document["teacher_top_k"] == 0
    spec["evaluation"] = {"examples": 0}
    assert not (run(spec).path / FOLDER).exists()
