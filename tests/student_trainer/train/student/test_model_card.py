"""Model cards of exports: what the hub reads from them, and what of a run stays out of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from tests.conftest import Models
from tests.student_trainer.train.runs import metric, spec_of
from tests.support.programs import Program

SECRET = "Zanzibar 4711"
BASE_CARD = "---\nlicense: other\nlicense_name: base-terms\nlicense_link: https://example.org\nbase_model: org/base\n---\n# Base\n"


@pytest.fixture
def licensed(models: Models, tmp_path: Path) -> Path:
    """A student with a card of its own."""
    directory = tmp_path / "licensed"
    shutil.copytree(models.student, directory)
    (directory / "README.md").write_text(BASE_CARD)
    return directory


@pytest.mark.parametrize("output", ["", "adapter", "both"])
def test_an_export_has_a_card_with_base_teacher_data_loss_evaluation_and_licence(
    run: Any, licensed: Path, dataset_file: Path, hf_teacher: Program, output: str
) -> None:
    adapter: dict[str, Any] = {"lora": {"rank": 2}, "output": output} if output else {}
    spec = spec_of(
        licensed,
        dataset_file,
        hf_teacher.target,
        student={"model": str(licensed), **adapter},
        optimizer={"max_steps": 2, "batch_size": 4},
        data={"chat": True},
        loss={"hard_weight": 0.5},
    )
    spec["teachers"][0]["prompt"] = {"system": SECRET}
    run_dir = run({**spec, "display_name": "tiny | student"})
    for path in sorted(run_dir.final_path.rglob("README.md")):
        text = path.read_text()
        card = ModelCard(text)
        is_adapter = output == "adapter" or path.parent.name == "adapter"
        assert card.data["library_name"] == ("peft" if is_adapter else "transformers")
        assert card.data["license_name"] == "base-terms"
        assert card.data["base_model"] == "org/base"
        assert card.data["pipeline_tag"] == "text-generation"
        values = {each.metric_type: each.metric_value for each in card.data["eval_results"]}
        assert values["kl"] == pytest.approx(metric(run_dir, "eval/kl")[2])
        for part in ("licensed", "teacher", "behind a prompt of its own", dataset_file.name, "2 steps"):
            assert part in text
        assert "1 x forward_kl + 0.5 x cross-entropy" in text
        for private in (SECRET, str(licensed.parent), str(dataset_file.parent), hf_teacher.target):
            assert private not in text
    assert (run_dir.final_path / "README.md").is_file()
    assert (run_dir.final_path / "adapter" / "README.md").is_file() == (output == "both")


def test_without_a_card_of_the_base_the_licence_is_unknown(
    run: Any, models: Models, dataset_file: Path
) -> None:
    spec = spec_of(
        models.student,
        dataset_file,
        None,
        loss={"terms": [{"weight": 0}], "hard_weight": 1},
        optimizer={"max_steps": 1},
    )
    text = (run(spec).final_path / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.get("license") is None
    assert card.data.get("base_model") is None
    assert "Licence | unknown" in text
    assert "| Teachers | none |" in text


def test_an_adapter_of_a_cut_base_names_no_model_of_a_hub_and_says_how_to_load_it(
    run: Any, licensed: Path, dataset_file: Path
) -> None:
    spec = spec_of(
        licensed,
        dataset_file,
        None,
        student={"model": str(licensed), "keep_layers": [0], "lora": {"rank": 2}, "output": "adapter"},
        loss={"terms": [{"weight": 0}], "hard_weight": 1},
        optimizer={"max_steps": 1},
    )
    text = (run(spec).final_path / "README.md").read_text()
    card = ModelCard(text)
    assert card.data["library_name"] == "peft"
    assert card.data.get("base_model") is None
    assert 'from_pretrained("DIR/base")' in text
    assert str(licensed.parent) not in text
