"""Completions become typed fields, or a reason; a hostile pattern does not hang."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.client.datasets.rows import data, read, write


def parsed(tmp_path: Path, text: str, *options: str) -> dict[str, Any]:
    source = write(tmp_path / "in.jsonl", [{"id": 1, "raw_output": text}])
    done = data("parse", "--in", source, "--out", tmp_path / "out.jsonl", *options)
    assert done.exit_code == 0, done.output
    (row,) = read(tmp_path / "out.jsonl")
    assert (row["id"], row["raw_output"]) == (1, text)
    return row


@pytest.mark.parametrize(
    ("text", "think", "answer"),
    [
        ("<think>so</think><answer>0.5</answer>", "so", "0.5"),
        ("so\n</think>\n\n<answer> 0.5 </answer> done", "so", "0.5"),
        ("<answer>0.5</answer>", None, "0.5"),
        ("<think>in <answer>?</think> <answer>0.5</answer>", "in <answer>?", "0.5"),
    ],
)
def test_sections_are_found(tmp_path: Path, text: str, think: str | None, answer: str) -> None:
    row = parsed(tmp_path, text, "--field", "holding_log_delta:float")
    assert (row["parse_ok"], row["parse_reason"]) == (True, None)
    assert (row["think"], row["answer"], row["holding_log_delta"]) == (think, answer, 0.5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("0.5", "<answer> is missing"),
        ("<think>so", "<think> is not closed"),
        ("<answer>0.5", "<answer> is not closed"),
        ("<answer>1</answer><answer>2</answer>", "<answer> is there several times"),
        ("", "the completion is empty"),
        (" \n", "the completion is empty"),
        ("</answer><answer>", "</answer> comes before <answer>"),
        ("<answer>about 5</answer>", "x: 'about 5' is no float"),
        ("<answer>nan</answer>", "x: 'nan' is no float"),
        ("<answer>1e999</answer>", "x: '1e999' is no float"),
        ("<answer>1_0</answer>", "x: '1_0' is no float"),
        ("<answer></answer>", "x: '' is no float"),
    ],
)
def test_a_text_that_is_not_as_wanted_has_a_reason(tmp_path: Path, text: str, reason: str) -> None:
    row = parsed(tmp_path, text, "--field", "x:float")
    assert (row["parse_ok"], row["parse_reason"], row["x"]) == (False, reason, None)


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ('{"x": 3}', "x:int", 3),
        ('{"x": 3.0}', "x:int", 3),
        ('{"x": 3}', "x:float", 3.0),
        ('```json\n{"x": true}\n```', "x:bool", True),
        ('{"a": [{"b/c": "t"}]}', "x:text=/a/0/b~1c", "t"),
        ('{"a": [1, null]}', "x:json=/a", [1, None]),
        ('{"x": 3}', "x:text", "x: 3 is no text"),
        ('{"x": true}', "x:int", "x: True is no int"),
        ('{"x": 1e999}', "x:float", "x: inf is no float"),
        ('{"x": 1e999}', "x:int", "x: inf is no int"),
        ('{"x": NaN}', "x:float", "x: the JSON has NaN, which is no number"),
        ('{"x": 1, "x": 2}', "x:int", "x: the JSON has a key twice"),
        ('{"y": 1}', "x:int", "x: the JSON has no /x"),
        ("[" * 100_000, "x:int", "x: the text is not JSON"),
        ('{"x": %s}' % ("9" * 5000), "x:float", "x: "),
    ],
)
def test_values_of_json_have_their_types(tmp_path: Path, text: str, option: str, value: Any) -> None:
    row = parsed(tmp_path, text, "--no-tags", "--json-field", option)
    if row["parse_ok"]:
        assert (row["x"], type(row["x"])) == (value, type(value))
    else:
        assert row["x"] is None
        assert row["parse_reason"].startswith(value)


@pytest.mark.parametrize(
    ("text", "pattern", "value"),
    [
        ("The delta is -0.25.", r"delta is (-?[0-9.]+[0-9])", -0.25),
        ("delta 1, delta 1", r"delta (?P<value>\d)(,)?", 1.0),
        ("delta 1, delta 2", r"delta (\d)", "x: the pattern finds several values"),
        ("nothing", r"delta (\d)", "x: the pattern finds nothing"),
    ],
)
def test_a_pattern_finds_one_value(tmp_path: Path, text: str, pattern: str, value: Any) -> None:
    row = parsed(tmp_path, text, "--no-tags", "--regex-field", f"x:float={pattern}")
    assert (row["x"] if row["parse_ok"] else row["parse_reason"]) == value


def test_a_hostile_pattern_or_text_does_not_hang(tmp_path: Path) -> None:
    began_s = time.monotonic()
    row = parsed(tmp_path, "a" * 5000 + "b", "--no-tags", "--regex-field", "x:text=^(a|aa)+$")
    assert time.monotonic() - began_s < 10
    assert row["parse_reason"] == "the pattern searches for more than 1 s"
    source = write(tmp_path / "many.jsonl", ({"raw_output": "a" * 5000 + "b"} for _ in range(100)))
    began_s = time.monotonic()
    done = data(
        "parse", "--in", source, "--out", tmp_path / "o", "--no-tags", "--regex-field", "x:text=^(a|aa)+$"
    )
    assert time.monotonic() - began_s < 40
    assert (done.exit_code, "Simplify the pattern" in done.stderr) == (2, True)
    assert not (tmp_path / "o").exists()


def test_each_sample_of_a_batch_is_a_row_that_can_be_trained_on(tmp_path: Path) -> None:
    samples = [
        {"text": "<answer>1</answer>", "finish_reason": "stop"},
        {"text": "<answer>", "finish_reason": "length"},
    ]
    failed = {"text": "<ans", "finish_reason": None, "error": {"reason": "X", "message": "y"}}
    rows: list[dict[str, Any]] = [
        {"id": "a", "system": "s", "prompt": "p", "completions": samples, "usage": {"prompt_tokens": 1}},
        {"id": "b", "messages": [{"role": "user", "content": "q"}], "completions": [samples[0]]},
        {"id": "c", "prompt": "p", "completions": [failed], "error": {"reason": "X", "message": "y"}},
        {"id": "d", "prompt": "p", "completion": "<answer>2</answer>"},
    ]
    source = write(tmp_path / "in.jsonl", rows)
    done = data("parse", "--in", source, "--out", tmp_path / "out.jsonl", "--field", "x:int")
    assert done.stdout.splitlines() == [
        f"{tmp_path / 'out.jsonl'}: 5 rows, 3 parsed",
        "  1 not: <answer> is not closed",
        "  1 not: the sample failed",
    ]
    first, second, third, fourth, fifth = read(tmp_path / "out.jsonl")
    assert (first["sample"], first["completion"], first["system"], first["x"]) == (
        0,
        "<answer>1</answer>",
        "s",
        1,
    )
    assert "usage" not in first
    assert (second["sample"], second["finish_reason"], second["parse_ok"]) == (1, "length", False)
    assert third["messages"][-1] == {"role": "assistant", "content": "<answer>1</answer>"}
    assert (fourth["parse_ok"], "completion" in fourth, fifth["x"]) == (False, False, 2)


@pytest.mark.parametrize(
    "options",
    [
        ["--field", "x"],
        ["--field", "x:date"],
        ["--field", "id:text", "--field", "id:text"],
        ["--field", "think:text"],
        ["--json-field", "x:int=a"],
        ["--regex-field", "x:int=("],
        ["--regex-field", "x:int=(a)(b)"],
        ["--regex-field", "x:int=" + "a" * 3000],
        ["--field", "x:int", "--within", "other"],
        ["--field", "id:int"],
        ["--text-field", "missing"],
        ["--json-field", "x:int=/a/~2"],
        ["--tag", "<x>"],
    ],
)
def test_bad_options_are_one_sentence_and_write_nothing(tmp_path: Path, options: list[str]) -> None:
    source = write(tmp_path / "in.jsonl", [{"id": 1, "raw_output": "<answer>1</answer>"}])
    done = data("parse", "--in", source, "--out", tmp_path / "out.jsonl", *options)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_completion_that_is_empty_is_none_that_is_missing(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "completion": ""},
        {"messages": [{"role": "user", "content": "a"}]},
    ]
    source = write(tmp_path / "in.jsonl", rows)
    done = data("parse", "--in", source, "--out", tmp_path / "out.jsonl")
    assert "row 2, field completion: is missing" in done.stderr
