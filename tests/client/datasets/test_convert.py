"""Conversions there and back give the rows that there were; what a format cannot hold is refused."""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stillhouse.client.datasets.conversion.convert import convert, original_rows
from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rows.reading.line_pairs import escape_line, unescape_line
from tests.client.datasets.rows import data, read, write


def as_json_has_it(text: str) -> str:
    """Returns a text as JSON gives it back: two halves of a pair that meet are one character."""
    return str(json.loads(json.dumps(text)))


TEXT = st.one_of(
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.text(
        st.sampled_from("\n\r\t\\nr\x00\x0b\x0c\x1c\x85\u2028\u2029🙂é \ud83d\ude42\ufeff\"'"), max_size=20
    ),
).map(as_json_has_it)
WELL_FORMED = TEXT.map(lambda text: text.encode("utf-8", "replace").decode())
FILLED = WELL_FORMED.map(lambda text: text or "x")
OTHERS = st.dictionaries(
    st.sampled_from(["source", "score", "tags", "nested"]),
    st.one_of(
        TEXT,
        st.integers(-(2**70), 2**70),
        st.booleans(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.lists(TEXT, max_size=2),
    )
    | st.dictionaries(TEXT, st.one_of(TEXT, st.none(), st.integers()), max_size=2),
    max_size=3,
)


@st.composite
def pairs(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Rows that a pair of lines can hold, with or without ids, whose texts need not be Unicode."""
    rows = []
    with_ids = draw(st.booleans())
    for at in range(draw(st.integers(1, 5))):
        form = draw(st.sampled_from(["prompt", "system", "messages", "short"]))
        prompt, completion, system = draw(TEXT), draw(TEXT), draw(TEXT)
        row: dict[str, Any] = {"prompt": prompt, "completion": completion}
        if form == "system":
            row["system"] = system
        if form in ("messages", "short"):
            turns = [("system", system), ("user", prompt), ("assistant", completion)]
            row = {"messages": [{"role": r, "content": c} for r, c in turns[form == "short" :]]}
        rows.append(
            row
            | draw(OTHERS)
            | ({"id": draw(st.sampled_from([9 - at, f"{at}", f"b{at}"]))} if with_ids else {})
        )
    return rows


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        messages = [{"role": "user", "content": draw(FILLED)}, {"role": "assistant", "content": draw(FILLED)}]
        if draw(st.booleans()):
            call = {
                "id": "1",
                "type": "function",
                "function": {"name": "f", "arguments": json.dumps({"a": draw(TEXT)})},
            }
            messages[1:1] = [
                {"role": "assistant", "content": None, "tool_calls": [call]},  # type: ignore[dict-item]
                {"role": "tool", "content": draw(FILLED), "tool_call_id": "1"},
            ]
        rows.append({"messages": messages} | draw(OTHERS))
    return rows


def there_and_back(folder: Path, rows: list[dict[str, Any]], to: Any, name: str) -> list[dict[str, Any]]:
    given_rows = write(folder / "rows.jsonl", rows)
    convert(given_rows, folder / name, to)
    convert(folder / name, folder / "back.jsonl", "rows")
    return read(folder / "back.jsonl")


LEGACY = [{"prompt": "a\\nb", "completion": "new"}]
"""The new row, as a pair without escapes and companion has it."""
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(TEXT)
def test_an_escaped_text_is_one_line_and_comes_back(text: str) -> None:
    line = escape_line(text)
    assert not set(line) & {"\n", "\r"}
    assert unescape_line(line) == text


@given(pairs())
@MANY
def test_pairs_of_lines_lose_nothing(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    assert there_and_back(tmp_path, rows, "source-target", "pair") == rows
    sources = (tmp_path / "pair.source").read_bytes()
    assert sources.count(b"\n") == (tmp_path / "pair.target").read_bytes().count(b"\n") == len(rows)


@given(conversations())
@MANY
def test_openai_files_lose_nothing(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    assert there_and_back(tmp_path, rows, "openai", "openai.jsonl") == rows
    for row in read(tmp_path / "openai.jsonl"):
        assert row.keys() <= {"messages", "tools", "parallel_tool_calls", "functions"}


@given(pairs() | conversations())
@MANY
def test_parquet_loses_nothing_but_null_fields(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    back = there_and_back(tmp_path, rows, "parquet", "rows.parquet")
    for row in rows:
        for message in row.get("messages", ()):
            for name in [name for name, value in message.items() if value is None]:
                del message[name]
    for row in back:
        for message in row.get("messages", ()):
            for name in [name for name, value in message.items() if value is None]:
                del message[name]
    assert back == rows


def test_a_pair_is_sorted_by_id_with_the_system_before_the_prompt(tmp_path: Path) -> None:
    rows = [
        {"id": 2, "system": "Be brief.", "prompt": "Two\nlines", "completion": "b"},
        {
            "id": 1,
            "messages": [{"role": "user", "content": "C:\\new"}, {"role": "assistant", "content": "a"}],
        },
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    done = data("convert", source, "--to", "source-target", "--out", tmp_path / "train")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "train.source").read_text() == "C:\\\\new\nBe brief.\\n\\nTwo\\nlines\n"
    assert (tmp_path / "train.target").read_text() == "a\nb\n"
    assert (tmp_path / "train.escaped").exists()
    done = data("convert", source, "--to", "source-target", "--out", tmp_path / "train", "--legacy-newlines")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "train.source").read_text() == "C:\\new\nBe brief.\n\nTwo\nlines\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "train.source", "train.target"]


def test_typed_columns_hold_what_they_can(tmp_path: Path) -> None:
    import pyarrow.parquet

    rows = [{"prompt": f"p{at}", "completion": "c", "n": at} for at in range(2000)]
    rows[1500]["prompt"] = "\ud800"
    source = write(tmp_path / "rows.jsonl", rows)
    done = data("convert", source, "--to", "parquet", "--out", tmp_path / "rows.parquet")
    assert "1 rows are in the column row_json" in done.stderr
    table = pyarrow.parquet.read_table(tmp_path / "rows.parquet")
    assert {"prompt", "completion", "n", "row_json"} == set(table.column_names)
    assert table["row_json"].null_count == 1999
    assert (
        data("convert", tmp_path / "rows.parquet", "--to", "rows", "--out", tmp_path / "b.jsonl").exit_code
        == 0
    )
    assert read(tmp_path / "b.jsonl") == rows


@pytest.mark.parametrize("name", ["", "..", "folder"])
def test_a_folder_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [{"text": "a"}])
    done = data("convert", "rows.jsonl", "--to", "rows", "--out", name)
    assert (done.exit_code, "is a folder. Name a file" in done.stderr) == (2, True), done.output


def test_turns_are_made_only_if_they_are_asked_for(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b", "id": 1}])
    done = data("convert", source, "--to", "messages", "--out", tmp_path / "out.jsonl")
    assert (done.exit_code, "--chat" in done.stderr) == (2, True)
    assert (
        data("convert", source, "--to", "messages", "--out", tmp_path / "out.jsonl", "--chat").exit_code == 0
    )
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert read(tmp_path / "out.jsonl") == [{"messages": turns, "id": 1}]


@pytest.mark.parametrize(
    ("changed", "said"), [([0, 1, 0], "has no row 3"), ([1, 0], "has the fields of another row 1")]
)
@pytest.mark.parametrize(("to", "name"), [("openai", "out.jsonl"), ("source-target", "out.source")])
def test_a_companion_of_other_rows_is_refused(
    tmp_path: Path, to: str, name: str, changed: list[int], said: str
) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    other = [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    source = write(
        tmp_path / "rows.jsonl", [{"messages": each, "id": at} for at, each in enumerate((turns, other))]
    )
    assert data("convert", source, "--to", to, "--out", tmp_path / name).exit_code == 0
    for path in (tmp_path / name, tmp_path / name.replace("source", "target")):
        lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(lines[at] for at in changed if at < len(lines) or path.suffix != ".jsonl"))
        if path.suffix == ".jsonl":
            break
    done = data("convert", tmp_path / name, "--to", "rows", "--out", tmp_path / "back.jsonl")
    assert (done.exit_code, f"{name}.fields.jsonl {said}" in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "back.jsonl").exists()


def killed_at(number: int, work: Callable[[], object]) -> bool:
    """Does `work` in a child that is gone at its rename or removal with this number, from 1; False if it has fewer."""
    child = os.fork()
    if child == 0:
        seen = itertools.count(1)
        sys.addaudithook(
            lambda event, _: (
                os._exit(9) if event in ("os.rename", "os.remove") and next(seen) == number else None
            )
        )
        with suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("kind", ["source-target", "legacy", "openai", "messages"])
def test_a_killed_conversion_leaves_no_mixture(tmp_path: Path, kind: str) -> None:
    """Whatever was removed or renamed, the rows read are those of before, those of after, or refused."""
    turns = [{"role": "user", "content": "a\\nb"}, {"role": "assistant", "content": "b"}]
    old = [{"messages": turns, "id": 1, "x": "old"}]
    new = [{"messages": [*turns[:1], {"role": "assistant", "content": "new"}], "id": 2}]
    source = write(tmp_path / "rows.jsonl", new)
    legacy = kind == "legacy"
    to: Any = "source-target" if legacy else kind
    before: Any = "openai" if to == "messages" else to
    name = tmp_path / ("out.source" if to == "source-target" else "out.jsonl")
    for number in itertools.count(1):
        convert(write(tmp_path / "old.jsonl", old), name, before)
        is_killed = killed_at(number, lambda: convert(source, name, to, legacy_newlines=legacy))
        try:
            found = [row for _, row in original_rows(name)]
        except StillhouseError:
            assert is_killed
        else:
            assert found in (old, new) or (legacy and found == LEGACY)
        if not is_killed:
            break
    assert number > 1


@pytest.mark.parametrize(
    ("row", "to", "said"),
    [
        ({"text": "a"}, "source-target", "no prompt to be the source"),
        ({"text": "a"}, "messages", "no conversation"),
        ({"messages": []}, "messages", "at least one message"),
        ({"x": 1}, "source-target", "row 2"),
        ({"messages": [{"role": "user", "content": "a"}]}, "source-target", "Convert to messages instead"),
        ({"prompt": "a", "completion": "b", "id": 1}, "source-target", "as that of row 1"),
        ({"prompt": "a", "completion": "b", "id": [1]}, "source-target", "field id"),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": "b", "thinking": "c"},
                ]
            },
            "openai",
            "no place in OpenAI's format",
        ),
        (
            {
                "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
                "tools": "[{",
            },
            "openai",
            "row 2, field tools: is not JSON",
        ),
        (
            {"row_json": '{"row_json": 1}'},
            "parquet",
            "row 2, field row_json: is a name that the conversion uses itself",
        ),
    ],
)
def test_rows_that_a_format_cannot_hold_are_refused_and_nothing_is_written(
    tmp_path: Path, row: dict[str, Any], to: str, said: str
) -> None:
    first = {"system": "s", "prompt": "a", "completion": "b", "id": 1}
    source = write(tmp_path / "rows.jsonl", [first, row])
    (tmp_path / "out.source").write_text("before")
    done = data("convert", source, "--to", to, "--out", tmp_path / "out.source")
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert (tmp_path / "out.source").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.source", "rows.jsonl"]


@pytest.mark.parametrize("to", ["rows", "messages", "openai", "source-target", "parquet"])
def test_a_value_that_neither_json_nor_columns_hold_is_named(tmp_path: Path, to: str) -> None:
    # A nanosecond is finer than what is read of it.
    when = pyarrow.array([0, 1], pyarrow.timestamp("ns"))
    table = pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"], "when": when})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    chat = ["--chat"] if to in ("messages", "openai") else []
    done = data("convert", tmp_path / "rows.parquet", "--to", to, *chat, "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert (
        f"row {2 if to == 'parquet' else 1}, field when: holds a Timestamp, which JSON does not"
        in done.stderr
    )
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


def test_a_name_that_no_column_has_comes_back_from_parquet(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "a", "completion": "b", "\udc00": 1},
        {"prompt": "c", "completion": "d"},
    ]
    source = write(tmp_path / "rows.jsonl", rows)
    convert(source, tmp_path / "out.parquet", "parquet")
    convert(tmp_path / "out.parquet", tmp_path / "again.jsonl", "rows")
    assert read(tmp_path / "again.jsonl") == rows


def test_an_input_that_is_a_loop_of_links_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    done = data("convert", tmp_path / "a.jsonl", "--to", "rows", "--out", tmp_path / "out.jsonl")
    assert done.exit_code == 2, done.output
    assert "a.jsonl is a link that leads nowhere" in done.stderr
