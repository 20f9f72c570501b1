"""Forms of rows that people have: each becomes the conversation that it means, and one file holds one form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.files import read_file
from stillhouse.protos.rows.reading.source import RowReader, RowSource
from stillhouse.protos.rows.row_forms import RowForms, known_fields
from stillhouse.protos.rows.training_row import parse_training_row

ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "1"}


@pytest.mark.parametrize(
    ("values", "messages", "trained"),
    [
        ({"instruction": "q", "input": "", "output": "a"}, [ASK, ANSWER], [1]),
        (
            {"instruction": "q", "input": "i", "output": "a", "text": "Below is … q … a", "system": "s"},
            [{"role": "system", "content": "s"}, {"role": "user", "content": "q\n\ni"}, ANSWER],
            [2],
        ),
        ({"instruction": "q", "output": "a", "history": [["q", "a"]]}, [ASK, ANSWER, ASK, ANSWER], [3]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [ASK, ANSWER],
            [1],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "s"},
                    {"from": "user", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "1"},
                    {"from": "chatgpt", "value": "a"},
                ]
            },
            [{"role": "system", "content": "s"}, ASK, CALLING, RESULT, ANSWER],
            [2, 4],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": 0}]
                * 2
            },
            [ASK, ANSWER] * 2,
            [],
        ),
        ({"conversations": [ASK, ANSWER]}, [ASK, ANSWER], [1]),
        ({"messages": json.dumps([ASK, ANSWER])}, [ASK, ANSWER], [1]),
        (
            {"messages": [ASK, {**ANSWER, "train": False}, ASK, {**ANSWER, "train": True}]},
            [ASK, ANSWER] * 2,
            [3],
        ),
        ({"messages": [{**ASK, "train": False}, ANSWER]}, [ASK, ANSWER], [1]),
        (
            {
                "messages": [
                    ASK,
                    {"role": "assistant", "function_call": {"name": "f", "arguments": '{"x": 1}'}},
                    {"role": "function", "name": "f", "content": "1"},
                    ANSWER,
                ],
                "functions": [{"name": "f", "parameters": {}}],
                "parallel_tool_calls": False,
            },
            [ASK, CALLING, {**RESULT, "name": "f"}, ANSWER],
            [1, 3],
        ),
    ],
)
def test_a_row_becomes_the_conversation_that_it_means(
    values: dict[str, Any], messages: list[Any], trained: list[int]
) -> None:
    turns = parse_training_row(RowForms().canonical(values), extra_fields="refuse").turns
    assert turns is not None
    assert list(turns.messages) == messages
    assert [at for at, each in enumerate(turns.trained) if each] == trained
    assert len(turns.tools) == ("functions" in values)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"question": "q", "answer": "a"}, "text is missing: a row needs messages, or prompt and completion, or text; it has answer, question. If"),
        ({"instruction": 3, "output": "a"}, 'instruction is the number 3, where text is needed. Write it as a string, such as "3".'),
        ({"instruction": "q", "output": "a", "history": ["q"]}, "history must be a list of pairs of text"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, 'conversations[0].from is "alien"; it must be one of human'),
        ({"conversations": ["q"]}, 'conversations[0] is the string "q"; it must be an object.'),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "conversations[0].value is not JSON"),
        ({"messages": "[{"}, "messages is not JSON"),
        ({"messages": [ASK], "functions": 3}, "functions is the number 3; it must be a list of functions."),
    ],
)  # fmt: skip
def test_a_row_that_means_nothing_is_refused_by_its_own_names(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FieldError) as caught:
        RowForms().canonical(values)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("message", "sentence"),
    [
        ({**ANSWER, "train": "yes"}, 'messages[1].train is "yes"; it must be true or false.'),
        ({**ANSWER, "train": True, "weight": 0}, "messages[1].train is true beside weight 0."),
        ({**ANSWER, "tool_calls": [CALL], "function_call": CALL["function"]}, "messages[1].function_call is given beside"),
        ({**ASK, "train": True}, 'messages[1].train is true in a turn of "user"'),
    ],
)  # fmt: skip
def test_marks_of_a_turn_that_contradict_themselves_are_refused(
    message: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(FieldError) as caught:
        parse_training_row({"messages": [ASK, message, ANSWER]})
    assert str(caught.value).startswith(sentence)


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_of_another_form_amid_a_file_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        {"text": "a"},
        {"text": "b"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    )
    sentence = r"rows\.jsonl, row 3, field conversations: makes it a row of sharegpt amid rows of text\. Put rows of each form"
    with pytest.raises(StillhouseError, match=sentence):
        list(read_file(path))
    source = RowSource(location=str(path), format="messages")
    with pytest.raises(
        StillhouseError, match=r"row 1, field messages: is missing in a row of messages; it is a row of text"
    ):
        list(RowReader(source))


def test_columns_name_the_fields_of_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", {"question": "q", "answer": "a", "level": 1, "prompt": "formatted"})
    columns = {"prompt": "question", "completion": "answer"}
    reader = RowReader(RowSource(location=str(path), columns=columns))
    assert [row for _, row in reader] == [{"prompt": "q", "completion": "a", "level": 1}]
    columns = {"prompt": "question", "completion": "question"}
    [(_, row)] = RowReader(RowSource(location=str(path), columns=columns))
    assert row == {"prompt": "q", "completion": "q", "answer": "a", "level": 1}
    columns = {"prompt": "question", "completion": "answr"}
    with pytest.raises(StillhouseError, match="field answr: is missing, which columns names as completion"):
        list(RowReader(RowSource(location=str(path), columns=columns)))


def test_a_batch_reads_the_prompt_of_any_form() -> None:
    assert known_fields({"instruction": "q", "input": "i"}) == {
        "prompt": [{"role": "user", "content": "q\n\ni"}]
    }
    assert known_fields({"conversations": [{"from": "human", "value": "q"}]}) == {"messages": [ASK]}
    assert known_fields({"token_ids": [1], "text": "t", "instruction": "q"})["token_ids"] == [1]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "instruction": "q", "output": "a"},
        {"prompt": "p", "completion": "c", "instruction": "q", "output": "a"},
        {"prompt": "q", "completion": "a", "messages": json.dumps([ASK, ANSWER])},
        {"prompt": "p", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "p", "text": "t"},
    ],
)
def test_a_row_of_several_forms_means_the_same_to_a_batch_and_in_training(row: dict[str, Any]) -> None:
    assert known_fields(row) == RowForms().canonical(row)
