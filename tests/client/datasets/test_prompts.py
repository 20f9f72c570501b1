"""Prompts of training rows, as a batch and as the recipe read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.client.batch.input_rows import Sampling, plain_row, read_lines
from tests.client.datasets.rows import data, read, write

USER = {"role": "user", "content": "q"}
SYSTEM = {"role": "system", "content": "s"}
ANSWER = {"role": "assistant", "content": "a"}


def test_a_batch_sees_the_context_of_each_training_row(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": "x", "messages": [SYSTEM, USER, ANSWER]},
        {"messages": [USER, ANSWER]},
        {"prompt": "plain", "completion": "c"},
        {
            "system": "s",
            "prompt": "q",
            "completion": "c",
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
        {"messages": [USER, ANSWER, USER, ANSWER]},
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    done = data("export-prompts", "--in", source, "--out", tmp_path / "prompts.jsonl")
    assert done.exit_code == 0, done.output
    found = read(tmp_path / "prompts.jsonl")
    assert found == [
        {"id": "x", "system": "s", "prompt": "q"},
        {"id": 2, "messages": [USER]},
        {"id": 3, "prompt": "plain"},
        {"id": 4, "system": "s", "prompt": "q", "tools": rows[3]["tools"]},
        {"id": 5, "messages": [USER, ANSWER, USER]},
        {"id": 6, "system": "s", "prompt": "q"},
    ]
    prompts = [plain_row(line, Sampling()) for line in read_lines(tmp_path / "prompts.jsonl")]
    assert [each.error for each in prompts] == [None] * 6
    roles = [[turn.role for turn in each.prompts[0].conversation.messages] for each in prompts]
    assert roles[:3] == [["system", "user"], ["user"], []]


def test_the_recipe_gets_two_equal_files_of_its_names(tmp_path: Path) -> None:
    source = write(
        tmp_path / "rows.jsonl", [{"id": "1", "messages": [SYSTEM, USER, ANSWER]}, {"prompt": "p\né"}]
    )
    done = data(
        "export-prompts", "--in", source, "--compat", "--out-dir", tmp_path / "o", "--stem", "banks", "--json"
    )
    assert json.loads(done.stdout)["rows"] == 2
    base, grpo = tmp_path / "o/banks_prompts_base.jsonl", tmp_path / "o/banks_prompts_grpo.jsonl"
    assert base.read_bytes() == grpo.read_bytes()
    assert read(base) == [
        {"id": "1", "system": "s", "prompt": "q"},
        {"id": 2, "system": "", "prompt": "p\né"},
    ]


def test_a_stem_is_no_path(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"id": 1, "prompt": "a"}])
    done = data("export-prompts", "--in", source, "--compat", "--out-dir", tmp_path / "o", "--stem", "../s")
    assert (done.exit_code, "no beginning of a file's name" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("row", "compat", "said"),
    [
        ({"id": 1, "prompt": "b"}, False, "as that of row 1"),
        ({"id": 1.5, "prompt": "b"}, False, "field id"),
        ({"text": "b"}, False, "no prompt"),
        ({"messages": [ANSWER]}, False, "no turn of a user"),
        ({"messages": [USER, ANSWER, USER]}, True, "Leave --compat out"),
        (
            {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]},
            True,
            "field tools",
        ),
    ],
)
def test_rows_without_a_prompt_and_ids_that_come_twice_are_refused(
    tmp_path: Path, row: dict[str, Any], compat: bool, said: str
) -> None:
    source = write(tmp_path / "rows.jsonl", [{"id": 1, "prompt": "a"}, row])
    out = (
        ["--compat", "--out-dir", tmp_path / "o", "--stem", "s"]
        if compat
        else ["--out", tmp_path / "o/p.jsonl"]
    )
    done = data("export-prompts", "--in", source, *out)
    assert (done.exit_code, "row 2" in done.stderr, said in done.stderr) == (2, True, True), done.stderr
    assert list((tmp_path / "o").iterdir()) == []
