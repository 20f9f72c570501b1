"""Fields of training rows: each is honoured or refused, and files are checked row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.files import check_file, read_file
from stillhouse.protos.rows.training_row import parse_training_row

ASK = {"role": "user", "content": "a"}
ANSWER = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("values", "chat", "messages", "trained"),
    [
        ({"prompt": "a", "completion": "b", "system": "s"}, False, [SYSTEM, ASK, ANSWER], [2]),
        ({"prompt": "a", "completion": "b"}, True, [ASK, ANSWER], [1]),
        ({"prompt": "a", "completion": "b", "tools": [TOOL]}, False, [ASK, ANSWER], [1]),
        ({"prompt": [ASK, ANSWER, ASK], "completion": [ANSWER]}, False, [ASK, ANSWER, ASK, ANSWER], [3]),
        ({"prompt": [ASK], "completion": "b", "system": "s"}, False, [SYSTEM, ASK, ANSWER], [2]),
        ({"messages": [ASK, {**ANSWER, "weight": 0}, ASK, ANSWER]}, False, [ASK, ANSWER, ASK, ANSWER], [3]),
        ({"messages": [ASK, ANSWER], "prompt": "a ", "system": "s"}, False, [SYSTEM, ASK, ANSWER], [2]),
    ],
)
def test_a_conversation_is_made_of_what_the_fields_mean(
    values: dict[str, Any], chat: bool, messages: list[Any], trained: list[int]
) -> None:
    turns = parse_training_row(values, chat=chat).turns
    assert turns is not None
    assert list(turns.messages) == messages
    assert [at for at, each in enumerate(turns.trained) if each] == trained
    assert list(turns.tools) == values.get("tools", [])


def test_rows_of_text_stay_text() -> None:
    row = parse_training_row(
        {"prompt": "a", "completion": "b", "system": None, "tools": [], "temperature": 1.0}
    )
    assert (row.kind, row.turns, row.prompt, row.completion) == ("completion", None, "a", "b")
    assert parse_training_row({"text": "to", "prompt": "t", "completion": None}).text == "to"
    assert parse_training_row({"text": "t", "id": 1, "tools": "[]", "chat_template_kwargs": "{}"}).text == "t"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"text": "t", "system": "s"}, "system has no effect on a row of text."),
        ({"text": "t", "tools": [TOOL]}, "tools has no effect on a row of text."),
        ({"text": "\ud800"}, "text has \\ud800 without its other half"),
        (
            {"messages": [ASK, ANSWER], "prompt": "other"},
            "prompt is given beside messages and is no part of them.",
        ),
        ({"messages": [ASK, ANSWER], "completion": "other"}, "completion is given beside messages"),
        ({"messages": [SYSTEM, ASK, ANSWER], "system": "other"}, "system differs from the system message"),
        ({"prompt": "a", "completion": ""}, "completion is empty, so there is nothing to learn."),
        ({"messages": [ASK, {**ANSWER, "content": ""}]}, "messages[1].content is empty, so there is"),
        ({"text": "t", "prompt": "a"}, "prompt is given beside text and is no part of it"),
        ({"text": "t", "completion": ["t"]}, "completion is given beside text and is no part of it"),
        (
            {"messages": [ASK, {**ANSWER, "role": "model"}]},
            'messages has no turn with role "assistant", so there is nothing to train on; its roles are "model", "user".',
        ),
        ({"messages": [ASK]}, 'messages has no turn with role "assistant"'),
        ({"prompt": [ASK, ANSWER], "completion": [ASK]}, 'messages has no turn with role "assistant"'),
        ({"prompt": ["a"], "completion": "b"}, 'prompt[0] is the string "a"; it must be an object.'),
        ({"prompt": "a", "completion": "b", "system": 3}, "system is the number 3; it must be a string."),
        ({"prompt": "a", "completion": "b", "weight": 0}, "weight is not supported, and would change"),
        ({"prompt": "a", "completion": "b", "functions": [{}]}, "functions is not supported"),
        (
            {"text": "t", "chat_template_kwargs": {"enable_thinking": False}},
            "chat_template_kwargs has no effect on a row of text.",
        ),
        ({"messages": [ASK, ANSWER], "images": ["a.png"]}, "images is not supported"),
        ({"messages": [ASK, ANSWER], "tools": "["}, "tools is not JSON"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "completion is missing"),
        ({"token_ids": [1, 2]}, "text is missing: a row needs messages"),
    ],
)
def test_fields_that_cannot_be_honoured_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FieldError) as caught:
        parse_training_row(values)
    assert str(caught.value).startswith(sentence)


def test_a_teacher_may_end_a_text_at_once() -> None:
    assert parse_training_row({"prompt": "a", "completion": "", "finish_reason": "stop"}).completion == ""
    row = {"messages": [ASK, {**ANSWER, "content": ""}], "finish_reason": "stop"}
    assert parse_training_row(row).kind == "messages"
    row = {"messages": [ASK, {**ANSWER, "content": "", "weight": 0}, ASK, ANSWER]}
    assert parse_training_row(row).kind == "messages"


def test_unknown_fields_are_kept_or_refused_by_one_rule() -> None:
    for values, field in (
        ({"text": "t", "systm": "s"}, "systm"),
        ({"messages": [ASK, {**ANSWER, "wieght": 0}]}, "messages[1].wieght"),
    ):
        parse_training_row(values)
        with pytest.raises(FieldError, match="is no field of a row") as caught:
            parse_training_row(values, extra_fields="refuse")
        assert caught.value.field == field
    row = {"text": "t", "id": 1, "topic": "x", "finish_reason": "stop", "max_tokens": 5}
    parse_training_row(row, extra_fields="refuse", own_fields=["topic"])


def test_weight_0_needs_a_run_that_learns_completions_only() -> None:
    values = {"messages": [ASK, {**ANSWER, "weight": 0}, ASK, ANSWER]}
    with pytest.raises(FieldError, match=r"data\.completion_only is false"):
        parse_training_row(values, completion_only=False)


def test_a_file_is_checked_to_its_last_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = {"prompt": "a", "completion": "b"}
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, good, {"prompt": "a"})))
    with pytest.raises(StillhouseError, match=r"rows\.jsonl, row 3, field completion: is missing") as caught:
        check_file(path, extra_fields="keep")
    assert caught.value.reason is Reason.DATASET_INVALID
    path.write_text("\n" + json.dumps(good) + "\n")
    assert check_file(path, extra_fields="keep") == 1
    path.write_text("\n\n")
    with pytest.raises(StillhouseError, match="has no rows"):
        check_file(path, extra_fields="keep")


def test_tables_lose_the_nulls_that_their_columns_force_on_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    other = {"role": "assistant", "tool_calls": [{"function": {"name": "g", "arguments": {"y": 2}}}]}
    path = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist([{"messages": [ASK, called]}, {"messages": [ASK, other]}])
    pyarrow.parquet.write_table(table, path)
    found = [parse_training_row(values).turns for _, values in read_file(path)]
    calls = [turns.messages[1]["tool_calls"][0]["function"] for turns in found if turns is not None]
    assert calls == [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": 2}}]


def test_a_file_whose_turns_all_have_weight_0_is_refused(tmp_path: Path) -> None:
    path, untrained = tmp_path / "rows.jsonl", {"messages": [ASK, {**ANSWER, "weight": 0}]}
    path.write_text((json.dumps(untrained) + "\n") * 2)
    with pytest.raises(StillhouseError, match=r"nothing to train on: every turn .* has weight 0 \(rows: 2\)"):
        check_file(path, extra_fields="keep")
    path.write_text(json.dumps(untrained) + "\n" + json.dumps({"messages": [ASK, ANSWER]}) + "\n")
    assert check_file(path, extra_fields="keep") == 2
