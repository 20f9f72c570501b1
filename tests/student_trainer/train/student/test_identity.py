"""A student that a resumed run meets: its settings and the weights under its adapter are those that the run began with."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from stillhouse.protos.errors import StillhouseError
from stillhouse.student_trainer.config.schema import LoraConfig, StudentConfig
from stillhouse.student_trainer.train.student.identity import check_same_student, identity_of
from tests.conftest import Models
from tests.student_trainer.train.students import load_student


def _identity(directory: Path, lora: LoraConfig | None) -> str:
    student = load_student(StudentConfig(model=str(directory), lora=lora), directory)
    return identity_of(student.plain, student.model)


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_a_changed_student_is_refused_by_what_changed(
    models: Models, tmp_path: Path, lora: LoraConfig | None
) -> None:
    directory = tmp_path / "student"
    shutil.copytree(models.student, directory)
    kept = _identity(directory, lora)
    check_same_student(None, kept, "it")
    moved = tmp_path / "moved"
    shutil.copytree(directory, moved)
    check_same_student(kept, _identity(moved, lora), "it")

    path = directory / "model.safetensors"
    save_file({name: each + 0.1 for name, each in load_file(path).items()}, path, metadata={"format": "pt"})
    if lora is None:  # the checkpoint has all weights
        check_same_student(kept, _identity(directory, lora), "it")
    else:
        with pytest.raises(StillhouseError, match="its weights, on which the adapter is trained, are others"):
            check_same_student(kept, _identity(directory, lora), "it")

    settings = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.5, "eos_token_id": 3}))
    with pytest.raises(StillhouseError, match=r"rms_norm_eps of its config.json is 0.5, and was 1e-06\. Put"):
        check_same_student(kept, _identity(moved, lora), "it")


def test_settings_that_one_version_lacks_are_not_compared() -> None:
    kept = json.dumps({"settings": {"old": 1, "both": 2}, "frozen weights": ""})
    check_same_student(kept, json.dumps({"settings": {"both": 2, "new": 3}, "frozen weights": ""}), "it")
