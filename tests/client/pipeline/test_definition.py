"""Pipeline files: every problem at once with its line, references that are checked before anything runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from stillhouse.client.pipeline.definition import load_pipeline
from stillhouse.client.pipeline.references import Reference, parse_reference, substituted
from stillhouse.client.pipeline.resolution import argv, fingerprint, resolved
from stillhouse.client.pipeline.run_file import stage_run
from stillhouse.client.pipeline.state import PipelineState
from stillhouse.protos.errors import StillhouseError


def written(directory: Path, text: str) -> Path:
    path = directory / "recipe.yaml"
    path.write_text(text)
    return path


def problems(directory: Path, text: str) -> str:
    with pytest.raises(StillhouseError) as raised:
        load_pipeline(written(directory, text))
    return raised.value.message


CATEGORIES = """
variables:
  category: [banks, households]
stages:
  - name: label
    for_each: category
    inputs: {prompts: "prompts/${category}.jsonl"}
    outputs: {rows: "labels-${category}.jsonl"}
    generate: {in: "${inputs.prompts}", out: "${outputs.rows}", adapter: "${category}", max_new_tokens: 8, chat: true}
  - name: clean
    for_each: category
    outputs: {rows: "clean-${category}.jsonl"}
    filter: {files: "${label.rows}", out: "${outputs.rows}"}
  - name: all
    outputs: {rows: all.jsonl}
    command: [cat, "${clean.rows}", "${clean[banks].rows}"]
  - name: student
    distil:
      data:
        train: [{path: "${clean.rows}", weight: 1}]
"""


def test_a_stage_stands_for_each_value_of_its_variable(tmp_path: Path) -> None:
    pipeline = load_pipeline(written(tmp_path, CATEGORIES))
    ids = [stage.id for stage in pipeline.stages]
    assert ids == [
        "label[banks]",
        "label[households]",
        "clean[banks]",
        "clean[households]",
        "all",
        "student",
    ]
    assert pipeline.stages[1].outputs == {"rows": "labels-households.jsonl"}
    assert pipeline.stages[1].inputs == {"prompts": "prompts/households.jsonl"}


def test_options_become_the_command_of_the_client(tmp_path: Path) -> None:
    pipeline = load_pipeline(written(tmp_path, CATEGORIES))
    state = PipelineState(pipeline.work, pipeline.path)
    work = tmp_path / "recipe.work"
    assert argv(resolved(pipeline, pipeline.stages[1], state)) == [
        "generate",
        f"--in={tmp_path}/prompts/households.jsonl",
        f"--out={work}/labels-households.jsonl",
        "--adapter=households",
        "--max-new-tokens=8",
        "--chat",
    ]
    assert argv(resolved(pipeline, pipeline.stages[3], state)) == [
        "data",
        "filter",
        f"--out={work}/clean-households.jsonl",
        "--",
        f"{work}/labels-households.jsonl",
    ]


def test_a_reference_to_several_values_becomes_as_many_items(tmp_path: Path) -> None:
    pipeline = load_pipeline(written(tmp_path, CATEGORIES))
    state = PipelineState(pipeline.work, pipeline.path)
    work = tmp_path / "recipe.work"
    everything = argv(resolved(pipeline, pipeline.stages[4], state))
    assert everything == [
        "cat",
        f"{work}/clean-banks.jsonl",
        f"{work}/clean-households.jsonl",
        f"{work}/clean-banks.jsonl",
    ]
    run = resolved(pipeline, pipeline.stages[5], state).plain_value()
    assert run == {
        "data": {
            "train": [
                {"path": f"{work}/clean-banks.jsonl", "weight": 1},
                {"path": f"{work}/clean-households.jsonl", "weight": 1},
            ]
        }
    }


def test_every_problem_is_reported_with_its_line(tmp_path: Path) -> None:
    text = problems(
        tmp_path,
        """stages:
  - name: a
    genrate: {in: x}
  - name: b
    generate: {in: "${a.rows}"}
  - name: b
    command: [ls]
  - name: c
    command: "ls -l"
  - name: d
    outputs: {rows: ../../etc/passwd}
    command: [touch, "${outputs.lines}", "${e.rows}", "${no such}"]
  - name: e
    cache: {}
    distil: {}
""",
    )
    lines = text.splitlines()
    assert [line.split("recipe.yaml:")[1].split(":")[0] for line in lines] == [
        *("2", "3", "5", "6", "9", "11", "12", "12", "12", "13"),
    ]
    for part in (
        "stages[0].genrate: there is no such field",
        'names "a", which is no earlier stage',
        'another stage is named "b"',
        "expects a list: the program, then its arguments",
        '"../../etc/passwd" is no path inside the work folder',
        "${outputs.lines} is not known here; known names: rows",
        "${no such} is no reference",
        "has cache and distil; a stage has one of",
    ):
        assert part in text, part


def test_an_empty_file_is_told_what_a_pipeline_needs(tmp_path: Path) -> None:
    assert "a pipeline needs stages" in problems(tmp_path, "# nothing\n")


@pytest.mark.parametrize(
    "text", ["", "stages: []", "stages: 3", "- a", "stages:\n  - name: inputs\n    command: [ls]"]
)
def test_a_file_without_stages_is_refused(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text)


def test_only_a_run_that_trains_has_outputs(tmp_path: Path) -> None:
    text = "stages:\n  - {name: a, outputs: {x: y}, evaluate: {}}\n"
    assert "makes no model, so it has no outputs" in problems(tmp_path, text)


def test_two_values_that_write_one_file_are_refused(tmp_path: Path) -> None:
    text = """
variables: {n: [1, 2]}
stages:
  - {name: a, for_each: n, outputs: {x: same}, command: [touch, "${outputs.x}"]}
"""
    assert "a[2] writes same, as a[1] does" in problems(tmp_path, text)


def test_dollars_and_keys_of_references() -> None:
    node = yaml.compose('["$${x}", "$$5", "a${s[k].n}b"]')
    assert node is not None
    seen: list[Reference] = []

    def values(reference: Reference) -> list[str]:
        seen.append(reference)
        return ["V"]

    replaced = substituted(node, values)
    assert [item.value for item in replaced.value] == ["${x}", "$5", "aVb"]
    assert set(seen) == {Reference(stage="s", key="k", name="n")}
    assert parse_reference("a.b.c") is None


def test_different_numbers_of_values_in_one_item_are_refused() -> None:
    node = yaml.compose('["${a.x} ${b.x}"]')
    assert node is not None
    counts = {"a": ["1", "2"], "b": ["1", "2", "3"]}
    with pytest.raises(ValueError, match=r"\$\{a.x\} 2, \$\{b.x\} 3"):
        substituted(node, lambda reference: counts[reference.stage])


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("outputs: {x: .}", "is no path inside the work folder"),
        ("outputs: {x: pipeline.json}", "is no path inside the work folder"),
        ("outputs: {x: m, y: ./m/z}", "or a path inside the other"),
        ("outputs: {x: m/z, y: m}", "or a path inside the other"),
        ('inputs: {x: "${outputs.y}"}, outputs: {y: y}', "a path of a stage has variables alone"),
        ("inputs: {x: a, x: b}", '"x" is given twice'),
        ("inputs: {x: !!python/name:os.system a}", "which a pipeline does not know"),
        ("inputs: &a {x: *a}", "more than 20,000 values"),
        ("inputs: {? [a] : b}", "expects a field name"),
    ],
)
def test_what_cannot_be_kept_apart_or_read_is_refused(tmp_path: Path, stage: str, said: str) -> None:
    assert said in problems(tmp_path, f"stages:\n  - {{name: a, command: [ls], {stage}}}\n")


def test_options_are_passed_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "stages:\n  - {name: a, mix: {files: [70:30, a, b], seed: 007, note: 2024-13-45, 1: x}}\n"
    )
    pipeline = load_pipeline(path)
    resolution = resolved(pipeline, pipeline.stages[0], PipelineState(pipeline.work, pipeline.path))
    options = ["--seed=007", "--note=2024-13-45", "-1", "x"]
    assert argv(resolution) == ["data", "mix", *options, "--", "70:30", "a", "b"]
    assert fingerprint(resolution, None)


def test_a_run_has_another_mark_after_a_change_of_its_data(tmp_path: Path) -> None:
    path, rows, tools = tmp_path / "p.yaml", tmp_path / "rows.jsonl", tmp_path / "t.json"
    (tmp_path / "run.yaml").write_text("data: {train: [{path: rows.jsonl}], tools: t.json}\n")
    path.write_text("stages:\n  - {name: a, file: run.yaml, distil: {}}\n")

    def mark() -> str:
        pipeline = load_pipeline(path)
        resolution = resolved(pipeline, pipeline.stages[0], PipelineState(pipeline.work, pipeline.path))
        return fingerprint(resolution, stage_run(resolution, pipeline))

    marks = []
    for row, tool in (("a", "[]"), ("b", "[]"), ("b", "[{}]")):
        rows.write_text(json.dumps({"text": row}))
        tools.write_text(tool)
        marks.append(mark())
    assert len(set(marks)) == 3
    assert mark() == marks[-1]
