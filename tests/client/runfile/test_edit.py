"""Edits of a run file: the value changes, every other line and comment stays, and the rest of the run is the same."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from stillhouse.client.runfile.edit import Value, edited
from stillhouse.client.runfile.load import parse_run
from stillhouse.client.runfile.set_options import set_options
from stillhouse.protos.errors import Reason, StillhouseError

TEXT = """\
# head
student:
  model: a/b   # the student
  # of the section
teachers:
  - targets: ["h:1"]  # one
data:
  train:
    - path: x.jsonl
      weight: 2
    - path: y
  seed: 3
optimizer: {learning_rate: 0.1, epochs: 2}
# end
"""


def lines_of(text: str, path: str, value: Value) -> tuple[set[str], set[str]]:
    """Lines that an edit removes and adds."""
    changed, keeps = edited(text, path, value)
    assert keeps
    before, after = set(text.split("\n")), set(changed.split("\n"))
    return before - after, after - before


@pytest.mark.parametrize(
    ("path", "value", "removed", "added"),
    [
        ("student.model", "c: d", {"  model: a/b   # the student"}, {"  model: 'c: d'   # the student"}),
        ("student.lora", {}, set(), {"  lora: {}"}),
        ("student.lora.rank", "8", set(), {"  lora:", "    rank: 8"}),
        (
            "optimizer.learning_rate",
            "1e-4",
            {"optimizer: {learning_rate: 0.1, epochs: 2}"},
            {"optimizer: {learning_rate: 1e-4, epochs: 2}"},
        ),
        (
            "optimizer.learning_rate",
            None,
            {"optimizer: {learning_rate: 0.1, epochs: 2}"},
            {"optimizer: {epochs: 2}"},
        ),
        ("data.train[0].weight", None, {"      weight: 2"}, set()),
        ("data.train[0].path", None, {"    - path: x.jsonl", "      weight: 2"}, {"    - weight: 2"}),
        ("data.train[1]", None, {"    - path: y"}, set()),
        ("data.train[2].path", "z", set(), {"    - path: z"}),
        ("data.seed", "4", {"  seed: 3"}, {"  seed: 4"}),
        (
            "teachers[0].targets",
            ["a", "b"],
            {'  - targets: ["h:1"]  # one'},
            {"  - targets: [a, b]  # one"},
        ),
        ("teachers[0].prompt.system", "hi", set(), {"    prompt:", "      system: hi"}),
        ("teachers[0]", None, {"teachers:", '  - targets: ["h:1"]  # one'}, set()),
        ("labels", {"a": "b", "c": "1"}, set(), {"labels:", "  a: b", "  c: '1'"}),
        ("student.model", None, {"student:", "  model: a/b   # the student"}, set()),
        ("loss.terms[0].divergence", "mse", set(), {"loss:", "  terms:", "    - divergence: mse"}),
        ("display_name", "x\ny", set(), {"display_name: |-", "  x", "  y"}),
        ("student.keep_layers", ["0", "2"], set(), {"  keep_layers: [0, 2]"}),
        ("cache.path", None, set(), set()),
    ],
)
def test_one_value_changes_and_all_other_lines_stay(
    path: str, value: Value, removed: set[str], added: set[str]
) -> None:
    assert lines_of(TEXT, path, value) == (removed, added)


def test_a_file_grows_from_nothing_and_shrinks_to_its_comments() -> None:
    text = "# mine\n"
    for path, value in (
        ("student.model", "m"),
        ("data.train[0].path", "d"),
        ("student.lora", {}),
        ("student.lora.rank", "8"),
    ):
        text, keeps = edited(text, path, value)
        assert keeps
    assert text == "# mine\nstudent:\n  model: m\n  lora:\n    rank: 8\ndata:\n  train:\n    - path: d\n"
    text, _ = edited(text, "student.lora.rank", None)
    assert "  lora: {}\n" in text  # which says something by being there
    for path in ("student.lora", "data.train[0]"):
        text, keeps = edited(text, path, None)
        assert keeps
    assert text == "# mine\nstudent:\n  model: m\n"


def test_the_files_own_spelling_is_kept() -> None:
    text = "student: {model: m}\noptimizer:\n  learningRate: 0.1  # high\n"
    assert edited(text, "optimizer.learning_rate", "0.2")[0] == text.replace("0.1", "0.2")


@pytest.mark.parametrize(
    "text",
    [
        "student: &s\n  model: a\nevaluation:\n  baseline: *s\n",
        "labels: &l {a: b}\nstudent:\n  model: a\nevaluation:\n  baseline: {model: &m c, revision: *m}\n",
    ],
)
def test_what_cannot_be_edited_in_place_is_written_anew(text: str) -> None:
    path = "evaluation.baseline.revision"
    changed, _ = edited(text, path, "main")
    wanted: dict[str, Any] = yaml.safe_load(text)
    wanted["evaluation"]["baseline"] = {**wanted["evaluation"]["baseline"], "revision": "main"}
    assert yaml.safe_load(changed) == wanted


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("a: [", "student.model"),
        ("- 1\n", "student.model"),
        (TEXT, "student.modle"),
        (TEXT, "student..model"),
        (TEXT, "student[0].model"),
        (TEXT, "data.train[7].path"),
        (TEXT, ""),
        (TEXT, "x" * 2000),
        ("a: &a [*a]\n", "student.model"),
        ("student: \ud800\n", "student.model"),
    ],
)
def test_other_text_and_other_paths_are_refused(text: str, path: str) -> None:
    with pytest.raises(StillhouseError) as caught:
        edited(text, path, "x")
    assert caught.value.reason == Reason.INVALID_SPEC


def test_a_wrong_value_stands_in_the_text_where_its_problem_is_shown() -> None:
    changed, _ = edited(TEXT, "optimizer.epochs", "many, or: few")
    with pytest.raises(StillhouseError) as caught:
        parse_run(changed.encode(), "run.yaml")
    assert "optimizer.epochs" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ([("optimizer.learning_rate", "1e-4")], ["optimizer.learning_rate=0.0001"]),
        (
            [("student.lora", {}), ("data.train[2].path", "z")],
            ["student.lora={}", 'data.train[2]={"path": "z"}'],
        ),
        (
            [("labels", {"a.b": "c d"}), ("data.chat", "true")],
            ["data.chat=true", "labels.a.b=c d"],
        ),
        ([("teachers[0].targets", ["a:1", "b"])], ['teachers[0].targets=["a:1", "b"]']),
        ([("data.train[0].weight", None)], None),
        ([("data.train[1]", None)], None),
        ([], []),
    ],
)
def test_options_of_a_command_lead_to_the_edited_run(
    changes: list[tuple[str, Value]], options: list[str] | None
) -> None:
    text = TEXT
    for path, value in changes:
        text, _ = edited(text, path, value)
    before, after = parse_run(TEXT.encode(), ""), parse_run(text.encode(), "")
    assert set_options(before.spec, after.spec) == options
    if options is not None:
        assert parse_run(TEXT.encode(), "", options).spec == after.spec
