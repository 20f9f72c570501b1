"""Batches of rows in other formats than JSONL: each row becomes a line, by its number in the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stillhouse.client.batch.input_rows import Sampling, count_rows, detect_format, plain_row, read_lines
from stillhouse.protos.errors import StillhouseError

ROWS = [{"prompt": "a", "id": "x"}, {"prompt": "b", "id": "y"}]


def write(path: Path) -> Path:
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(ROWS, indent=1))
        case ".csv":
            path.write_text("prompt,id\na,x\nb,y\n")
        case ".source":
            path.write_text("a\nb\n")
            path.with_suffix(".target").write_text("1\n2\n")
        case _:
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.source"])
def test_rows_of_every_format_become_prompts(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    lines = list(read_lines(path))
    rows = [plain_row(line, Sampling()) for line in lines]
    assert [row.prompts[0].text for row in rows] == ["a", "b"]
    assert [row.id for row in rows] == ([1, 2] if name == "rows.source" else ["x", "y"])
    assert (count_rows(path), detect_format(path)) == (2, "plain")
    assert [line.number for line in lines] == [0, 1]
    assert len({line.digest for line in lines}) == 2


def test_alpaca_and_sharegpt_become_conversations(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]
    rows = [
        {"instruction": "q", "input": "i"},
        {"conversations": turns},
        {"conversations": [{"from": "alien"}]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alpaca, shared, alien = (plain_row(line, Sampling()) for line in read_lines(path))
    assert [each.content for each in alpaca.prompts[0].conversation.messages] == ["q\n\ni"]
    assert [each.role for each in shared.prompts[0].conversation.messages] == ["system", "user"]
    assert alien.error is not None
    assert str(alien.error).startswith('Line 3: conversations[0].from is "alien"')


def test_a_table_that_cannot_be_read_ends_the_batch_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt\na\nb,c\n")
    with pytest.raises(StillhouseError, match=r"rows\.csv, row 3, field \(the line\): has 2 cells"):
        list(read_lines(path))
