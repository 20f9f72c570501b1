"""The example run files train: as they stand, with tiny models and fewer steps in place of what a user puts there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from tests.conftest import Models
from tests.student_trainer.train.runs import events, finish_here, make_run, metric
from tests.support.processes import no_process_left
from tests.support.programs import Program, start_teacher
from tests.support.small_models import main

EXAMPLES = Path(__file__).parents[3] / "examples" / "runs"
STEPS = 3


@pytest.fixture(scope="module")
def adapted_teacher(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A teacher with the adapters of the example."""
    adapters = ["--adapter", f"billing={models.adapter_a}", "--adapter", f"travel={models.adapter_b}"]
    with (
        no_process_left() as mark,
        start_teacher(
            models.teacher,
            engine="hf",
            directory=tmp_path_factory.mktemp("adapted"),
            options=["--dtype", "float32", "--threads", "1", "--max-adapters", "2", *adapters],
            environment=mark,
        ) as program,
    ):
        yield program


def _spec(name: str, models: Models, data: Path, target: str) -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    spec["student"]["model"] = str(models.student)
    for teacher in spec["teachers"]:
        teacher["targets"] = [target]
    spec["data"]["train"] = [{"path": str(data)}]
    optimizer = {"max_steps": STEPS, "batch_size": 4, "learning_rate": 1e-3}
    spec["optimizer"] = {**spec.get("optimizer", {}), **optimizer}
    for context in spec.get("contexts", []):
        for kind in ("student", "teacher"):
            if kind in context:
                context[kind]["generation"]["max_new_tokens"] = 8
    return spec


@pytest.mark.parametrize("name", ["on_policy", "teacher_prompt", "teacher_writes", "qlora"])
def test_an_example_trains(
    name: str, models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    run_dir = make_run(tmp_path, name, _spec(name, models, dataset_file, hf_teacher.target))
    assert finish_here(run_dir) == 0, events(run_dir)
    assert len(metric(run_dir, "train/loss")) == STEPS


def test_a_student_made_as_the_example_says_learns_from_a_foreign_teacher(
    models: Models, dataset_file: Path, hf_teacher: Program, tmp_path: Path
) -> None:
    options = [
        "--tokenizer-from",
        str(dataset_file),
        "--vocab-size",
        "300",
        "--hidden-size",
        "32",
        "--layers",
        "1",
    ]
    made = CliRunner().invoke(
        main, ["--like", str(models.teacher), "--out", str(tmp_path / "student"), *options]
    )
    assert made.exit_code == 0, made.output
    spec = _spec("foreign_tokenizer", models, dataset_file, hf_teacher.target)
    spec["student"]["model"] = str(tmp_path / "student")
    spec["data"].pop("eval")
    run_dir = make_run(tmp_path, "foreign", spec)
    assert finish_here(run_dir) == 0, events(run_dir)
    assert len(metric(run_dir, "train/alm_forward_kl")) == STEPS
    assert set(metric(run_dir, "eval/alm")) >= {0, STEPS}


def test_each_category_learns_from_its_adapter(
    models: Models, dataset_file: Path, adapted_teacher: Program, tmp_path: Path
) -> None:
    """A student that is the teacher with one adapter merged has loss 0 on that adapter's rows alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(models.teacher)
    merged = PeftModel.from_pretrained(base, models.adapter_a).merge_and_unload()
    merged.save_pretrained(tmp_path / "billing")
    AutoTokenizer.from_pretrained(models.teacher).save_pretrained(tmp_path / "billing")
    rows = [json.loads(line) for line in dataset_file.read_text().splitlines()]
    losses = {}
    for category in ("billing", "travel"):
        data = tmp_path / f"{category}.jsonl"
        data.write_text("".join(json.dumps({**row, "category": category}) + "\n" for row in rows))
        spec = _spec("adapters_per_category", models, data, adapted_teacher.target)
        spec["student"]["model"] = str(tmp_path / "billing")
        spec["optimizer"]["learning_rate"] = 1e-12
        # Draws' counts are never those of the student itself.
        spec["loss"] = {**spec.get("loss", {}), "sparse_target": "tail_bucket"}
        for teacher in spec["teachers"]:
            teacher["logprob_dtype"] = "float32"
        run_dir = make_run(tmp_path, f"run-{category}", spec)
        assert finish_here(run_dir) == 0, events(run_dir)
        losses[category] = metric(run_dir, "train/loss")[1]
        identities = json.loads(run_dir.teacher_path.read_text())
        assert set(identities) == {"billing", "travel"}
    assert abs(losses["billing"]) < 1e-5
    assert losses["travel"] > 1e-3
