"""Files of rows: the same rows come out of every container, and damage is told by file and row."""

from __future__ import annotations

import csv
import gzip
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.files import read_file
from stillhouse.protos.rows.reading import delimited, json_rows
from stillhouse.protos.rows.reading.source import RowReader, RowSource

ROWS: list[dict[str, Any]] = [
    {"prompt": "How many? 🍎", "completion": 'Drei Äpfel, "so".'},
    {"prompt": "a\tb, c", "completion": "d"},
]


def json_text(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_zstd(path: Path, data: bytes) -> None:
    import pyarrow

    with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(data)


def write_table(path: Path, delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def write_pair(path: Path) -> None:
    for name, side in (("prompt", "source"), ("completion", "target")):
        path.with_suffix(f".{side}").write_text("".join(f"{row[name]}\n" for row in ROWS), encoding="utf-8")


def write_parquet(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def write_saved(path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(path))


CONTAINERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "JSONL": ("rows.jsonl", lambda path: path.write_text(json_text(ROWS), encoding="utf-8")),
    "JSON array": ("rows.json", lambda path: path.write_text(json.dumps(ROWS, indent=2))),
    "CSV": ("rows.csv", lambda path: write_table(path, ",")),
    "TSV": ("rows.tsv", lambda path: write_table(path, "\t")),
    "Parquet": ("rows.parquet", write_parquet),
    "line pairs": ("rows.source", write_pair),
    "saved dataset": ("saved", write_saved),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_same_rows_come_out_of_every_container(container: str, tmp_path: Path) -> None:
    name, write = CONTAINERS[container]
    write(tmp_path / name)
    reader = read_file(tmp_path / name)
    assert (reader.container, [row for _, row in reader]) == (container, ROWS)
    assert reader.form == "prompt_completion"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ""])
@pytest.mark.parametrize("packed", ["gzip", "zstd"])
def test_compression_is_found_by_its_first_bytes(suffix: str, packed: str, tmp_path: Path) -> None:
    plain = tmp_path / f"rows{suffix}"
    delimiters = {".csv": ",", ".tsv": "\t"}
    if suffix in delimiters:
        write_table(plain, delimiters[suffix])
    else:
        plain.write_text(json.dumps(ROWS) if suffix == ".json" else json_text(ROWS), encoding="utf-8")
    path = tmp_path / f"packed{suffix}{'.gz' if packed == 'gzip' else '.zst'}"
    if packed == "gzip":
        # Files that were put together have several members.
        half = len(plain.read_bytes()) // 2
        path.write_bytes(gzip.compress(plain.read_bytes()[:half]) + gzip.compress(plain.read_bytes()[half:]))
    else:
        write_zstd(path, plain.read_bytes())
    assert [row for _, row in read_file(path)] == ROWS
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole[: len(whole) // 3]):
        path.write_bytes(damaged)
        with pytest.raises(StillhouseError, match=r"cannot be read as a (gzip|zstd) file") as caught:
            list(read_file(path))
        assert caught.value.reason is Reason.DATASET_INVALID


TWICE = '{"prompt": "a", "completion": "b"}', '{"prompt": "c", "completion": "d", "prompt": "e"}'
NESTED = (
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "content": "c"}]}'
)


@pytest.mark.parametrize("packed", [".gz", ".zst", ""])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_name_that_a_row_gives_twice_is_refused(
    suffix: str, packed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "_CHUNK_BYTES", 9)
    path = tmp_path / f"rows{suffix}{packed}"
    for rows, place in ((TWICE, "row 2, field prompt"), ((NESTED,), "row 1, field content")):
        text = "\n".join(rows) if suffix == ".jsonl" else f"[{', '.join(rows)}]"
        if packed == ".zst":
            write_zstd(path, text.encode())
        else:
            path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        with pytest.raises(
            StillhouseError, match=f"{path}, {place}: is given twice in one object.* Remove one"
        ):
            list(read_file(path))
        refused: list[StillhouseError] = []
        left = list(RowReader(RowSource(location=str(path)), refuse=refused.append))
        assert len(left) == len(rows) - 1
        assert refused[0].metadata["field"] == place.rpartition(" ")[2]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_json_does_not_hold_is_refused_in_any_field(
    number: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"rows{suffix}"
    row = f'{{"prompt": "a", "completion": "b", "note": {{"score": [1.5, {number}]}}}}'
    path.write_text(row if suffix == ".jsonl" else f"[{row}]")
    with pytest.raises(
        StillhouseError, match=f"{path}, row 1, field score: holds {number}, which JSON does not"
    ):
        list(read_file(path))


def test_a_number_before_an_object_of_its_list_is_refused_by_the_name_of_the_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "note": {"scores": [NaN, {"of": 1}]}}')
    with pytest.raises(StillhouseError, match="row 1, field scores: holds NaN, which JSON does not"):
        list(read_file(path))


def test_a_row_of_a_table_with_nan_is_not_written_as_json(tmp_path: Path) -> None:
    rows = [(1, {"prompt": "a", "score": 1.5}), (2, {"prompt": "b", "score": math.nan})]
    with pytest.raises(
        StillhouseError, match=r"t\.parquet, row 2, field score: holds NaN or an infinite number"
    ):
        list(json_rows.as_json_lines(tmp_path / "t.parquet", rows))


def test_a_quote_without_an_end_is_refused_before_the_file_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "_MAX_ROW_LINES", 50)
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\na,b\na,"b\n' + "\n" * 47 + '"\na,b\n')  # 49 lines in one row
    assert len(list(read_file(path))) == 3
    path.write_text('prompt,completion\na,b\na,"b\n' + "\n" * 100_000)
    with pytest.raises(
        StillhouseError, match=r"row 3, field .the line.: does not end within 50 lines; close its quotes"
    ):
        list(read_file(path))


# Two rows as the program zstd writes them, with a checksum of the content in the last four bytes.
CHECKED_ZSTD = bytes.fromhex(
    "28b52ffd24486d010014027b2270726f6d7074223a20226130222c2022636f6d"
    "706c6574696f6e62227d0a3103004011471de182e9047f34b5e8"
)


def test_a_wrong_checksum_of_a_compressed_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(CHECKED_ZSTD)
    assert [row["prompt"] for _, row in read_file(path)] == ["a0", "a1"]
    path.write_bytes(CHECKED_ZSTD[:-1] + bytes([CHECKED_ZSTD[-1] ^ 1]))
    with pytest.raises(StillhouseError, match=r"cannot be read as a zstd file .*checksum"):
        list(read_file(path))


def test_an_array_is_read_row_by_row_wherever_its_bytes_are_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "Äpfel 🍎 " * at, "n": [at, {"a": None}], "half": "\ud83d"} for at in range(1, 40)]
    path = tmp_path / "rows.json"
    for text in (
        json.dumps(rows, indent=1),
        "\ufeff" + json.dumps(rows),
        json.dumps(rows, separators=(",", ":")),
    ):
        path.write_text(text, encoding="utf-8")
        for size in (1, 7, 64, 1 << 20):
            monkeypatch.setattr(json_rows, "_CHUNK_BYTES", size)
            assert list(read_file(path).raw()) == list(enumerate(rows, start=1))


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.json", '[{"text": "a"}, {"text": ]', "row 2, field (the line): is not JSON"),
        (
            "a.json",
            '[{"text": "a"} {"text": "b"}]',
            'row 1, field (the line): is followed by "{" in place of ","',
        ),
        ("a.json", '[{"text": "a"}', "row 1, field (the line): is followed by the end of the file"),
        ("a.json", '[{"text": "a"}] x', "row 1, field (the line): is followed by text behind the array"),
        ("a.json", "[1]", "row 1, field (the line): is the number 1; it must be a JSON object"),
        ("a.jsonl", '{"text": "a"}\n\n{"text": }\n', "row 3, field (the line): is not JSON"),
        (
            "a.csv",
            'text\n"a\nb"\nc,d\n',
            "row 4, field (the line): has 2 cells, and the first line names 1 columns",
        ),
        ("a.csv", "text,text\na,b\n", "row 1, field (the line): names the column 'text' twice"),
        ("a.csv", "text,\na,b\n", "row 1, field (the line): has a column without a name"),
        (
            "a.csv",
            "prompt;completion\na;b\n",
            "row 1, field (the line): names one column, 'prompt;completion'",
        ),
        ("a.csv", 'text\n"a" b\n', "row 2, field (the line): is not CSV"),
        ("a.csv", "prompt,completion\na,\n", "row 2"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), "row 1, field (the line): is not UTF-8 (byte 0)"),
        ("a.csv", "text\nb\ncafé\n".encode("latin-1"), "row 3, field (the line): is not UTF-8 (byte 3)"),
        ("a.json", '[{"text": "café"}]'.encode("latin-1"), "row 1, field (the line): is not UTF-8 (byte 14)"),
        ("a.jsonl", '{"text": ' + "[" * 100_000, "row 1, field (the line): is nested too deeply. Write"),
        ("a.json", '[{"text": ' + "[" * 100_000, "row 1, field (the line): is nested too deeply. Write"),
        (
            "a.jsonl",
            '{"n": ' + "9" * 5000 + "}",
            "row 1, field (the line): has a whole number of more than 4300",
        ),
        ("a.jsonl", "null\n", "row 1, field (the line): is null; it must be a JSON object"),
        ("a.jsonl", "BZh91AY", "it is compressed by bzip2; gzip and zstd are read"),
    ],
)
def test_a_row_that_cannot_be_read_is_told_by_file_and_line(
    name: str, text: str | bytes, sentence: str, tmp_path: Path
) -> None:
    from stillhouse.protos.rows.files import check_file

    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(StillhouseError) as caught:
        check_file(path, extra_fields="keep")
    assert str(path) in caught.value.message
    assert sentence in caught.value.message
    assert caught.value.reason is Reason.DATASET_INVALID


def test_the_other_rows_are_read_if_bad_ones_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{\n[]\n{"txt": "b"}\n{"text": "c"}\n')
    refused: list[StillhouseError] = []
    rows = list(RowReader(RowSource(location=str(path)), refuse=refused.append))
    assert rows == [(1, {"text": "a"}), (5, {"text": "c"})]
    assert [each.metadata["row"] for each in refused] == ["2", "3", "4"]


def test_cells_are_text_but_for_settings_and_an_empty_one_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt,completion,temperature,seed,id,system\n7,8,0.5,3,12,\n")
    assert [row for _, row in read_file(path)] == [
        {"prompt": "7", "completion": "8", "temperature": 0.5, "seed": 3, "id": "12"}
    ]


@pytest.mark.parametrize("name", ["rows.source", "rows.target", "rows"])
def test_a_pair_is_found_from_either_name_and_from_their_stem(name: str, tmp_path: Path) -> None:
    write_pair(tmp_path / "rows.source")
    assert [row for _, row in read_file(tmp_path / name)] == ROWS


def test_a_pair_needs_both_files_and_equal_counts_of_lines(tmp_path: Path) -> None:
    source, target = tmp_path / "rows.source", tmp_path / "rows.target"
    source.write_text("a\nb\nc")
    with pytest.raises(
        StillhouseError, match=r"rows\.source is one file of a pair, and .*rows\.target"
    ) as caught:
        list(read_file(source))
    assert caught.value.reason is Reason.DATASET_NOT_FOUND
    target.write_text("a\nb\n")
    with pytest.raises(StillhouseError, match=r"rows\.source has 3 lines and .*rows\.target has 2"):
        next(iter(read_file(source)))


def test_lines_are_unescaped_where_a_file_beside_them_says_so(tmp_path: Path) -> None:
    (tmp_path / "rows.source").write_text("a\\nb \\\\nabla\n")
    (tmp_path / "rows.target").write_text("c\n")
    assert next(iter(read_file(tmp_path / "rows")))[1]["prompt"] == "a\\nb \\\\nabla"
    (tmp_path / "rows.escaped").touch()
    assert next(iter(read_file(tmp_path / "rows")))[1]["prompt"] == "a\nb \\nabla"


def test_a_dataset_of_several_splits_needs_a_name(tmp_path: Path) -> None:
    import datasets

    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": split, "test": split.select([1])}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(StillhouseError, match=r"holds several splits; name one of train, test with split"):
        list(read_file(tmp_path / "saved"))
    source = RowSource(location=str(tmp_path / "saved"), split="test")
    assert [row for _, row in RowReader(source)] == ROWS[1:]


@pytest.mark.parametrize(("split", "config"), [("test", ""), ("", "main")])
def test_a_file_has_no_splits(tmp_path: Path, split: str, config: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n')
    with pytest.raises(StillhouseError, match="is read as JSONL, which has neither splits"):
        RowReader(RowSource(location=str(path), split=split, config=config))


def test_what_is_nowhere_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(StillhouseError, match="There is no dataset at") as caught:
        read_file(tmp_path / "rows.jsonl")
    assert caught.value.reason is Reason.DATASET_NOT_FOUND


def test_what_is_neither_file_nor_folder_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, other in (("a", "b"), ("b", "a"), ("lost", "nowhere")):
        (tmp_path / name).symlink_to(tmp_path / other)
    for name, sentence in (
        ("pipe", "is a pipe, and rows are read more than once. Give a file."),
        ("a", "is a link that leads nowhere. Correct the link."),
        ("lost", "is a link that leads nowhere. Correct the link."),
    ):
        with pytest.raises(StillhouseError) as caught:
            read_file(tmp_path / name)
        assert caught.value.message == f"{tmp_path / name} {sentence}"


def test_a_column_that_a_table_has_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    columns = [pyarrow.array([each]) for each in ("a", "b", "c")]
    table = pyarrow.Table.from_arrays(columns, names=["prompt", "completion", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(StillhouseError, match="has the column prompt twice"):
        list(read_file(tmp_path / "rows.parquet"))


def test_a_place_that_does_not_open_is_told(tmp_path: Path) -> None:
    with pytest.raises(StillhouseError, match="cannot be opened: File name too long") as error:
        RowReader(RowSource(location=str(tmp_path / ("a" * 300))))
    assert error.value.reason is Reason.DATASET_INVALID
