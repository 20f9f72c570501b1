"""The run files in examples/runs/ are valid as they are, and say what they need."""

from __future__ import annotations

from pathlib import Path

import pytest

from stillhouse.client.runfile.load import load_run_file
from stillhouse.student_trainer.config.proto import from_proto

EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "runs").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_valid_run(path: Path) -> None:
    spec = load_run_file(path).spec
    config = from_proto(spec)
    foreign, is_cut = config.loss.foreign_tokenizer == "alm", bool(config.student.keep_layers)
    own = ".demo/teacher" if is_cut else ".demo/student"
    assert config.student.model == (".demo/foreign-student" if foreign else own)
    assert config.teachers[0].targets == ("127.0.0.1:7401",)
    paths = [dataset.path for dataset in (*config.data.train, *config.data.eval)]
    files = ("train.jsonl", "held_out.jsonl", "by_category.jsonl", "classes.jsonl")
    assert set(paths) <= {f".demo/data/{name}" for name in files}


def test_there_are_examples_to_copy() -> None:
    assert {path.name for path in EXAMPLES} >= {
        "quickstart.yaml",
        "online.yaml",
        "lora.yaml",
        "hard_and_soft.yaml",
        "offline.yaml",
        "foreign_tokenizer.yaml",
    }
