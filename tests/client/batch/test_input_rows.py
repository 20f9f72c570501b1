"""Rows that cannot be used: the error names field and value in JSON's words."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from stillhouse.client.batch.input_rows import InputLine, Sampling, detect_format, plain_row, read_lines
from stillhouse.client.batch.unique_ids import check_ids
from stillhouse.protos.errors import StillhouseError


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"prompt": 3}, "prompt is the number 3; it must be a string, or an array of messages."),
        ({"prompt": "a", "temperature": "hot"}, 'temperature is the string "hot"; it must be a number.'),
        ({"prompt": "a", "temperature": True}, "temperature is true; it must be a number."),
        ({"prompt": "a", "top_p": [1]}, "top_p is an array; it must be a number."),
        ({"prompt": "a", "top_k": 1.5}, "top_k is 1.5; it must be a whole number in [0, 2147483647]."),
        (
            {"prompt": "a", "seed": "1"},
            'seed is the string "1"; it must be a whole number in [-9223372036854775808,',
        ),
        ({"prompt": "a", "adapter": {}}, "adapter is an object; it must be a string."),
        ({"prompt": "a", "stop": 5}, "stop is the number 5; it must be a string, or an array of strings."),
        ({"prompt": "a", "stop": ["b", None]}, "stop[1] is missing; it must be a string."),
        (
            {"prompt": "a", "stop": ["b", ""]},
            "stop has an empty string, which every text ends with. Remove it.",
        ),
        ({"prompt": "a", "stop": "\ud83d"}, r"stop[0] has \ud83d without its other half: a pair such as"),
        ({"prompt": "a", "adapter": "\ude00b"}, r"adapter has \ude00 without its other half"),
        ({"prompt": "a\ud83d"}, r"prompt has \ud83d without its other half"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, r"messages[0].content has \ud83d without"),
        ({"token_ids": "5"}, 'token_ids is the string "5"; it must be an array of whole numbers.'),
        ({"token_ids": [5, "6"]}, 'token_ids[1] is the string "6"; it must be a whole number.'),
        ({"token_ids": [2**70]}, "token_ids has a number that is not a token id."),
        ({"messages": []}, "messages is empty; it must be an array of at least one message."),
        ({"messages": {}}, "messages is an object; it must be an array of at least one message."),
        ({"messages": ["a" * 90]}, f'messages[0] is the string "{"a" * 39}…; it must be an object.'),
    ],
)
def test_a_bad_field_is_named_with_its_value(row: dict[str, Any], sentence: str) -> None:
    data = json.dumps(row).encode()
    parsed = plain_row(InputLine(number=0, line_number=1, data=data, digest="", end=len(data)), Sampling())
    assert parsed.error is not None
    assert parsed.error.message.startswith(sentence)


def test_a_field_that_is_given_twice_is_named() -> None:
    data = b'{"prompt": "a", "id": 1, "prompt": "b"}'
    parsed = plain_row(InputLine(number=0, line_number=3, data=data, digest="", end=len(data)), Sampling())
    assert parsed.error is not None
    assert parsed.error.message.startswith("Line 3, field prompt: is given twice in one object")


def test_a_date_of_a_table_is_refused_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "p", "day": date(2024, 1, 1)}]), path)
    with pytest.raises(
        StillhouseError, match=r"in\.parquet, row 1, field day: holds a date, which JSON does not"
    ):
        list(read_lines(path))


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (({"id": "a"}, {}, {"id": "b"}, {"id": "a"}), 'lines 1 and 5 have the same id, "a". Give each row'),
        (({"id": 3}, {}), r"lines 1 and 3 have the same id, 3 \(a row without an id has the number of its"),
        (({"id": [1, {"x": 2}]}, {"id": [1, {"x": 2}]}), "lines 1 and 3 have the same id, an array"),
        (({"custom_id": "x", "body": {}}, {"custom_id": "x", "body": {}}), 'lines 1 and 3 .* id, "x"'),
    ],
)
def test_an_id_that_two_rows_have_is_refused_with_both_lines(
    rows: tuple[dict[str, Any], ...], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "in.jsonl"
    lines = [json.dumps(each) for each in rows]
    path.write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    with pytest.raises(StillhouseError, match=f"{path}: {sentence}"):
        check_ids(path, detect_format(path))


def test_ids_that_differ_or_cannot_be_read_are_no_reason_to_refuse_a_batch(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(
        '{"id": 1}\n{"id": "1"}\n{"id": true}\n{"id": null}\n{"id": null}\n{"id": 1, broken\n{"id": 1.5}\n'
    )
    check_ids(path, "plain")
    check_ids(path, "openai")
