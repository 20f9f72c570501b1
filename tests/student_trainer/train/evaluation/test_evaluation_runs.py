"""Runs that evaluate: their numbers are those of transformers, they leave training alone, and the best checkpoint is exported."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from stillhouse.protos.evaluation.report import PLACE
from stillhouse.protos.evaluation.row_sums import score_texts
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.process import failpoints
from tests.conftest import Models
from tests.student_trainer.train.runs import (
    assert_same_end,
    final_weights,
    finish,
    finish_here,
    make_run,
    metric,
    spec_of,
)
from tests.support.processes import no_process_left
from tests.support.programs import Program

Train = Callable[..., RunDir]
TEXT_METRICS = ["bleu", "chrf", "rouge", "accuracy"]


def evaluation_spec(models: Models, data: Path, **further: Any) -> dict[str, Any]:
    """Evaluates the student on the rows of `data`."""
    return {
        "task": "evaluate",
        "student": {"model": str(models.student)},
        "data": {"eval": [{"path": str(data)}]},
        "evaluation": {"metrics": ["perplexity"], "limit": 16},
        **further,
    }


def report_of(run_dir: RunDir) -> dict[str, Any]:
    """Metrics of each set by name."""
    report = json.loads((run_dir.path / PLACE).read_bytes())
    return {each["name"]: each["metrics"] for each in report["sets"]}


def direct_loss(model_dir: Path, rows: list[dict[str, str]]) -> tuple[float, int]:
    """Cross-entropy of the completions and their ends, summed, by transformers in float64; and the number of tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64).eval()
    total, tokens = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
        assert ids[: len(prompt)] == prompt
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits
        losses = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
        total, tokens = total + float(losses), tokens + len(ids) - len(prompt)
    return total, tokens


def test_perplexity_is_that_of_transformers_in_float64(models: Models, run: Train, tmp_path: Path) -> None:
    # A word begins with its space, so no token lies on both sides of the cut.
    rows = [
        {"prompt": text.split(": ")[0] + ":", "completion": " " + text.split(": ")[1]}
        for text in models.texts[:16]
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(evaluation_spec(models, path))
    loss, tokens = direct_loss(models.student, rows)
    assert metric(done, "eval/tokens") == {1: tokens}
    assert metric(done, "eval/perplexity")[1] == pytest.approx(math.exp(loss / tokens), rel=1e-6)
    found = report_of(done)[""]["perplexity"]["after"]
    assert found["value"] == metric(done, "eval/perplexity")[1]
    assert found["low"] < found["value"] < found["high"]


@pytest.mark.slow
def test_text_metrics_do_not_change_what_is_trained(
    models: Models, dataset_file: Path, hf_teacher: Program, run: Train
) -> None:
    dropout = {
        "student": {"model": str(models.student), "lora": {"rank": 4, "dropout": 0.2}, "output": "merged"}
    }
    plain = run(spec_of(models.student, dataset_file, hf_teacher.target, **dropout))
    sampled = {"generation": {"temperature": 0.7, "max_new_tokens": 6}}
    for generation in ({}, sampled):
        evaluation = {"every_steps": 2, "metrics": ["kl", "ece", *TEXT_METRICS], **generation}
        written = run(
            spec_of(models.student, dataset_file, hf_teacher.target, **dropout, evaluation=evaluation)
        )
        assert_same_end(written, plain)
        assert set(metric(written, "eval/bleu")) == {0, 2, 4, 6, 8}
    lines = (written.path / "evaluations/texts_after.jsonl").read_text().splitlines()
    texts = [json.loads(line) for line in lines]
    scores = score_texts("chrf", [each["text"] for each in texts], [each["reference"] for each in texts])
    assert metric(written, "eval/chrf")[8] == scores["chrf"].value
    report = report_of(written)[""]
    assert set(report["kl"]) == {"before", "after", "change"}
    assert set(report["perplexity"]) == {"teacher", "before", "after", "change"}
    assert "signature" in report["bleu"]


BEST = "ece"
"""A metric that training neither raises nor lowers steadily."""


def best_spec(models: Models, data: Path) -> dict[str, Any]:
    return spec_of(
        models.student,
        data,
        None,
        loss={"terms": [{"weight": 0}], "hard_weight": 1},
        optimizer={"max_steps": 10, "learning_rate": 3e-2, "lr_scheduler": "constant"},
        checkpoint={"every_steps": 100, "keep": 1},
        evaluation={"every_steps": 1, "metrics": ["perplexity", BEST], "best_metric": BEST},
    )


def test_the_best_checkpoint_is_kept_and_exported_also_after_a_kill(
    models: Models, dataset_file: Path, run: Train, tmp_path: Path
) -> None:
    undisturbed = run(best_spec(models, dataset_file))
    curve = metric(undisturbed, f"eval/{BEST}")
    best = min((step for step in curve if step), key=lambda step: curve[step])
    assert 1 < best < 10, curve
    assert undisturbed.checkpoints() == [best, 10]
    kept = load_file(undisturbed.checkpoint_path(best) / "model.safetensors")
    assert all(np.array_equal(kept[name], weight) for name, weight in final_weights(undisturbed).items())
    record = undisturbed.trained()
    assert record is not None
    assert (record.step, record.last_step) == (best, 10)

    killed = make_run(tmp_path, "killed", best_spec(models, dataset_file))
    with no_process_left() as mark:
        # While the last checkpoint is written, which would remove the best one if it were forgotten.
        improvements = len([step for step in curve if step and curve[step] == min(_seen(curve, step))])
        failpoint = f"checkpoint.before_rename:{improvements + 1}"
        assert finish(killed, 1, {**mark, failpoints.VARIABLE: failpoint}) == -signal.SIGKILL
    assert killed.checkpoints() == [best]
    assert finish_here(killed, 2) == 0
    assert_same_end(killed, undisturbed)
    assert killed.checkpoints() == [best, 10]


def _seen(curve: dict[int, float], step: int) -> list[float]:
    return [value for at, value in curve.items() if 0 < at <= step]


def test_sets_baseline_and_teacher_stand_in_one_report(
    models: Models, dataset_file: Path, hf_teacher: Program, run: Train, tmp_path: Path
) -> None:
    choices = tmp_path / "choices.jsonl"
    rows = [{"prompt": "Say ", "choices": ["yes", "no", "perhaps"], "answer": each % 3} for each in range(6)]
    choices.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(
        evaluation_spec(
            models,
            dataset_file,
            teachers=[{"targets": [hf_teacher.target], "logprob_dtype": "float32"}],
            evaluation={
                "metrics": ["kl", "agreement", "acceptance", "overlap", "perplexity", "ece", "bleu"],
                "limit": 8,
                "generation": {"max_new_tokens": 5},
                "baseline": {"model": str(models.teacher)},
                "sets": [
                    {"name": "few", "path": str(dataset_file), "limit": 4, "metrics": ["perplexity"]},
                    {
                        "name": "quiz",
                        "path": str(choices),
                        "match": "choices",
                        "metrics": ["accuracy", "ece"],
                    },
                ],
            },
        )
    )
    report = report_of(done)
    held_out = report[""]
    # The baseline is the teacher's own model.
    assert held_out["kl"]["before"]["value"] == pytest.approx(0, abs=1e-5)
    assert held_out["acceptance"]["before"]["value"] == pytest.approx(1, abs=1e-3)
    assert held_out["agreement"]["before"]["value"] == held_out["overlap"]["before"]["value"] == 1
    for name in ("perplexity", "ece"):
        assert held_out[name]["before"]["value"] == pytest.approx(
            held_out[name]["teacher"]["value"], rel=1e-4
        )
    change = held_out["kl"]["change"]
    assert 0 < change["low"] < change["value"] == pytest.approx(metric(done, "eval/kl")[2], abs=1e-5)
    assert set(held_out["bleu"]) == {"teacher", "before", "after", "change", "signature"}
    assert set(report["few"]) >= {"perplexity"}
    # The same question has one likeliest choice, which is right once in three.
    assert report["quiz"]["accuracy"]["after"]["value"] == pytest.approx(1 / 3)
    assert report["quiz"]["accuracy"]["teacher"]["value"] == pytest.approx(1 / 3)
    assert metric(done, "eval/quiz/accuracy") == {2: pytest.approx(1 / 3)}
    assert not metric(done, "eval/few/kl")


def test_rows_that_cannot_be_evaluated_are_named(
    models: Models, dataset_file: Path, run: Train, tmp_path: Path
) -> None:
    from tests.student_trainer.train.runs import failure

    path = tmp_path / "choices.jsonl"
    for row, sentence in (
        ({"prompt": "a", "choices": ["x"], "answer": 0}, "give 2 or more"),
        ({"prompt": "a", "choices": ["x", "y"], "answer": 2}, "names none of the 2 choices"),
        ({"prompt": "a", "completion": "b"}, "it must be a list of texts"),
    ):
        path.write_text(json.dumps(row) + "\n")
        sets = [{"name": "quiz", "path": str(path), "match": "choices"}]
        failed = run(evaluation_spec(models, dataset_file, evaluation={"sets": sets}), code=3)
        assert sentence in failure(failed)
        assert "row 1" in failure(failed)


def test_a_served_teacher_is_scored_alone(
    models: Models, dataset_file: Path, hf_teacher: Program, run: Train
) -> None:
    spec = evaluation_spec(
        models,
        dataset_file,
        teachers=[{"targets": [hf_teacher.target], "logprob_dtype": "float32"}],
        evaluation={
            "metrics": ["perplexity", "ece", "chrf"],
            "limit": 8,
            "generation": {"max_new_tokens": 5},
            "teacher_alone": True,
        },
    )
    alone = report_of(run(spec))[""]
    assert {*alone["perplexity"], *alone["chrf"]} == {"teacher", "signature"}
    spec["student"] = {"model": str(models.teacher)}
    del spec["evaluation"]["teacher_alone"], spec["teachers"]
    spec["evaluation"]["metrics"].remove("chrf")
    itself = report_of(run(spec))[""]
    for name in ("perplexity", "ece"):
        assert alone[name]["teacher"]["value"] == pytest.approx(itself[name]["after"]["value"], rel=1e-4)
