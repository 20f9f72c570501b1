"""The JSON Schema of a run file says what run files may hold, and is that of the configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from scripts.reference import run_file
from stillhouse.client.cli import cli
from stillhouse.client.runfile.load import load_run_file
from stillhouse.protos.errors import StillhouseError
from stillhouse.student_trainer.config.proto import from_proto
from tests.student_trainer.config.specs import SMALLEST

SCHEMA = yaml.safe_load(run_file.json_schema())
EXAMPLES = sorted((Path(__file__).parents[3] / "examples" / "runs").glob("*.yaml"))
CHECKER = jsonschema.Draft202012Validator(SCHEMA)


class Yaml12Loader(yaml.SafeLoader):
    """Takes 1e-4 for a number, as run files, editors and YAML 1.2 do, and PyYAML does not."""


Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def with_field(path: str, value: Any) -> dict[str, Any]:
    """SMALLEST with `value` at the dotted `path` of dictionaries."""
    values: dict[str, Any] = {name: each.copy() for name, each in SMALLEST.items()}
    here: Any = values
    *parents, last = path.split(".")
    for parent in parents:
        here = here.setdefault(parent, {})
    here[last] = value
    return values


def service_accepts(tmp_path: Path, values: dict[str, Any]) -> bool:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    try:
        from_proto(load_run_file(file).spec)
    except StillhouseError:
        return False
    return True


def test_nothing_is_offered_that_is_refused() -> None:
    for text in (run_file.json_schema(), run_file.page()):
        assert not re.search("not implemented|evaluate\\b.*not", text)


def test_the_command_prints_a_schema_of_draft_2020_12() -> None:
    printed = CliRunner().invoke(cli, ["run", "schema"])
    assert printed.exit_code == 0
    assert yaml.safe_load(printed.output) == SCHEMA
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_keeps_the_schema_and_names_it_for_editors(path: Path) -> None:
    text = path.read_text()
    CHECKER.validate(yaml.load(text, Loader=Yaml12Loader))
    first = text.splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    assert (path.parent / first.partition("=")[2]).resolve().name == "run_schema.json"
    assert (path.parent / first.partition("=")[2]).exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optimizer.micro_batch_tokens", "auto"),
        ("optimizer.microBatchTokens", 512),
        ("loss.top_k", 256),
        ("loss.topK", 1),
        ("optimizer.learning_rate", 1e-4),
        ("optimizer.maxSteps", None),
        ("data.eval_fraction", 0),
        ("student.lora", {"targetModules": "q_proj"}),
        ("teachers", [{"targets": "host:7401"}]),
        ("student.lora", {"target_modules": ["q_proj", "v_proj"]}),
        ("labels", {"team": "a"}),
        ("contexts", [{"dataset": {}}, {"teacher": {"generation": {"maxNewTokens": 8}}}]),
    ],
)
def test_the_schema_takes_what_a_run_file_may_hold(tmp_path: Path, path: str, value: Any) -> None:
    values = with_field(path, value)
    assert service_accepts(tmp_path, values)
    CHECKER.validate(values)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("optimizer.micro_batch_tokens", "many"),
        ("optimizer.micro_batch_tokens", 0),
        ("loss.top_k", 257),
        ("loss.topK", 0),
        ("loss.topk", 8),
        ("optimizer.learning_rate", 0),
        ("optimizer.name", "adamw_4bit"),
        ("data.eval_fraction", 1),
        ("student", {}),
        ("student.lora", {"layers": [-1]}),
        ("evaluation.metrics", ["meteor"]),
        ("contexts", [{"weight": 1}]),
        ("contexts", [{"dataset": {}, "teacher": {}}]),
        ("display_name", "x" * 201),
        ("cache", {"mode": "read"}),
    ],
)
def test_the_schema_refuses_what_the_service_refuses(tmp_path: Path, path: str, value: Any) -> None:
    values = with_field(path, value)
    assert not service_accepts(tmp_path, values)
    assert not CHECKER.is_valid(values)
