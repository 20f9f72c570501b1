"""Filters drop what they say and nothing else, and give the reason."""

from __future__ import annotations

import json
import random
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tests.client.datasets.rows import data, read, write


def filtered(tmp_path: Path, rows: list[dict[str, Any]], *options: object) -> tuple[list[Any], list[Any]]:
    """The ids of the rows that stay, and filter and reason by id of the others."""
    source = write(tmp_path / "in.jsonl", [{"id": at, **row} for at, row in enumerate(rows)])
    out, dropped = tmp_path / "out.jsonl", tmp_path / "dropped.jsonl"
    done = data("filter", "--in", source, "--out", out, "--dropped", dropped, "--json", *options)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    left_out = read(dropped)
    assert (told["rows"], told["kept"]) == (len(rows), len(read(out)))
    assert sum(told["dropped"].values()) == len(left_out)
    return [row["id"] for row in read(out)], [
        (row["id"], row["dropped"]["filter"], row["dropped"]["why"]) for row in left_out
    ]


def texts(*completions: str) -> list[dict[str, Any]]:
    return [{"prompt": "p", "completion": each} for each in completions]


def test_lengths_have_bounds(tmp_path: Path) -> None:
    rows = texts("a" * 4, "a" * 5, "a" * 7, "a" * 8)
    kept, dropped = filtered(tmp_path, rows, "--min-chars", 5, "--max-chars", 7)
    assert (kept, [each[2] for each in dropped]) == ([1, 2], ["4 chars, at least 5", "8 chars, at most 7"])
    rows = [{"prompt": "p", "completion": "c", "num_tokens": count} for count in (1, 2, 3)]
    assert filtered(tmp_path, rows, "--min-tokens", 2, "--max-tokens", 2)[0] == [1]


def test_truncated_unparsed_and_unlikely_completions_are_dropped(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "p",
            "completion": "c",
            "finish_reason": end,
            "parse_ok": ok,
            "parse_reason": "r",
            "mean_logprob": mean,
        }
        for end, ok, mean in (
            ("stop", True, -1.0),
            ("MAX_TOKENS", True, -1.0),
            ("stop", False, -1.0),
            ("stop", True, -2.5),
        )
    ]
    kept, dropped = filtered(tmp_path, rows, "--no-truncated", "--parse-ok", "--min-mean-logprob", -2)
    assert kept == [0]
    assert dropped == [
        (1, "truncated", "finish_reason MAX_TOKENS"),
        (2, "parse_ok", "r"),
        (3, "mean_logprob", "-2.500, at least -2"),
    ]


def test_repetition_is_the_share_of_runs_that_came_before(tmp_path: Path) -> None:
    loop, some = "one two three four " * 10, "a b c d e f g h a b c d"
    rows = texts(loop, some, "short", "東京" * 20, "every word of this sentence is another one")
    kept, dropped = filtered(tmp_path, rows, "--max-repetition", 0.2)
    assert kept == [1, 2, 4]
    assert dropped[0][2] == f"{1 - 4 / 37:.3f} of runs repeated, at most 0.2"


def test_of_equal_rows_the_first_is_kept(tmp_path: Path) -> None:
    rows = [*texts("a", "b", "a"), {"prompt": "q", "completion": "a"}, {"prompt": "p", "completion": "a�"}]
    kept, dropped = filtered(tmp_path, rows, "--no-duplicates")
    assert (kept, dropped) == ([0, 1, 3, 4], [(2, "duplicate", "the text of row 1")])


def test_of_similar_rows_the_first_is_kept(tmp_path: Path) -> None:
    rng = random.Random(0)
    originals = [" ".join(rng.choices([f"w{at}" for at in range(500)], k=60)) for _ in range(200)]
    near = [text.replace(text.split()[30], "changed", 1) for text in originals[:50]]
    kept, dropped = filtered(tmp_path, texts(*originals, *near), "--near-duplicates", 0.8)
    assert kept == list(range(200))
    assert [each[0] for each in dropped] == list(range(200, 250))
    assert "like row 1," in dropped[0][2]


def test_rows_that_share_text_with_an_evaluation_file_are_dropped(tmp_path: Path) -> None:
    question = "If Ada has three apples and buys four more how many apples does she have in all"
    task = " ".join(f"rule{at}" for at in range(30))
    held_out = write(
        tmp_path / "eval.jsonl",
        [
            {"prompt": question, "completion": "7"},
            {"system": task, "prompt": "Name it!", "completion": "yes"},
        ],
    )
    rows = [
        {"prompt": f"Solve this. {question.upper()}, now?", "completion": "7"},
        {"prompt": "If Ada has three apples and buys four more pears", "completion": "so what"},
        {"system": task, "prompt": "name it", "completion": "no"},
        {"system": task, "prompt": "please name it", "completion": "yes"},
    ]
    kept, dropped = filtered(tmp_path, rows, "--against", held_out)
    assert kept == [1, 3]
    assert [each[0] for each in dropped] == [0, 2]
    assert dropped[0][2].startswith("row 1 of eval.jsonl: ")
    assert dropped[1][2] == 'row 2 of eval.jsonl: "name it"'
    assert filtered(tmp_path, rows, "--against", held_out, "--against-words", 6)[0] == [3]


def test_a_shared_system_text_makes_no_rows_similar(tmp_path: Path) -> None:
    task = " ".join(f"rule{at}" for at in range(200))
    rows = [
        {"system": task, "prompt": f"question {at} of many here", "completion": f"answer {at}"}
        for at in range(9)
    ]
    assert filtered(tmp_path, rows, "--near-duplicates", 0.8)[0] == list(range(9))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "at least one filter"),
        (["--parse-ok"], "stillhouse data parse"),
        (["--min-mean-logprob", "-1"], "generate --capture"),
        (["--max-tokens", "5"], "generate --capture"),
        (["--no-duplicates", "--dropped", "out.jsonl"], "an output twice"),
        (["--no-duplicates", "--dropped", "in.jsonl"], "would be overwritten"),
        (["--against", "missing.jsonl"], "missing.jsonl"),
        (["--min-chars", "5", "--max-chars", "3"], "so no row passes"),
        (["--near-duplicates", "nan"], "nan is no finite number"),
        (["--min-mean-logprob", "nan"], "nan is no finite number"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in.jsonl", texts("a", "b"))
    done = data("filter", "--in", "in.jsonl", "--out", "out.jsonl", *options)
    assert done.exit_code in (2, 4), done.output
    assert said in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_rows_that_differ_in_calls_alone_are_no_duplicates(tmp_path: Path) -> None:
    def row(city: str) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "weather", "arguments": {"city": city}}}
        turns = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
        ]
        return {"messages": turns}

    rows = [row("Oslo"), row("Rome"), row("Oslo")]
    assert filtered(tmp_path, rows, "--no-duplicates")[0] == [0, 1]
    assert filtered(tmp_path, rows, "--near-duplicates", 0.8)[0] == [0, 1, 2]  # no words to compare


def test_samples_of_a_batch_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    sample = {"text": "c", "finish_reason": "length"}
    source = write(tmp_path / "in.jsonl", [{"prompt": "p", "completions": [sample]}])
    done = data("filter", "--in", source, "--out", tmp_path / "out.jsonl", "--no-truncated")
    assert done.exit_code != 0
    assert "stillhouse data parse" in done.output


def test_a_date_of_a_table_is_refused_with_a_remedy(tmp_path: Path) -> None:
    row = {"prompt": "p", "completion": "c", "day": date(2024, 1, 1)}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "in.parquet")
    done = data("filter", "--in", tmp_path / "in.parquet", "--out", tmp_path / "out.jsonl", "--no-duplicates")
    assert "in.parquet, row 1, field day: holds a date, which JSON does not. Write" in done.output
    assert not list(tmp_path.glob("*out.jsonl*"))
