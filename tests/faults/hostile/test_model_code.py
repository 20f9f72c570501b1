"""A model directory that wants to run code of its own, as pickled weights or as modules: it is refused, and nothing runs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.student_trainer.run_dir import EXIT_FAILED
from tests.conftest import Models
from tests.student_trainer.train.runs import failure, finish_here, make_run, spec_of

CODE = """
from pathlib import Path
Path({token!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class EvilConfig(LlamaConfig):
    model_type = "evil"
class EvilModel(LlamaForCausalLM):
    config_class = EvilConfig
"""


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(params=["pickle", "code"])
def hostile(request: pytest.FixtureRequest, models: Models, tmp_path: Path) -> tuple[Path, Path]:
    """A model directory, and what is there once its code has run."""
    model, token = tmp_path / "model", tmp_path / "it-ran"
    shutil.copytree(models.student, model)
    if request.param == "pickle":
        (model / "model.safetensors").unlink()
        (model / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Touch(token)}))
    else:
        config = json.loads((model / "config.json").read_text())
        config["model_type"] = "evil"
        config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
        (model / "config.json").write_text(json.dumps(config))
        (model / "evil.py").write_text(CODE.format(token=str(token)))
    return model, token


@pytest.mark.faults(row=14)
def test_a_student_that_brings_code_is_refused_and_its_code_does_not_run(
    hostile: tuple[Path, Path], dataset_file: Path, tmp_path: Path
) -> None:
    model, token = hostile
    loss = {"terms": [{"weight": 0}], "hard_weight": 1}
    run_dir = make_run(tmp_path, "hostile", spec_of(model, dataset_file, None, loss=loss))
    assert finish_here(run_dir) == EXIT_FAILED
    assert str(model) in failure(run_dir)
    assert not token.exists()


@pytest.mark.faults(row=14)
@pytest.mark.slow
def test_a_teacher_that_brings_code_is_refused_and_its_code_does_not_run(hostile: tuple[Path, Path]) -> None:
    model, token = hostile
    command = [
        sys.executable,
        "-m",
        "stillhouse.teacher_service",
        "--engine",
        "hf",
        "--listen",
        "127.0.0.1:0",
    ]
    done = subprocess.run(
        [*command, "--model", str(model)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert not token.exists()
