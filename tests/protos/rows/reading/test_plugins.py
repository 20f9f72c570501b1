"""Sources of rows in other packages: found by their entry point, numbered, and named in errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rows.files import read_file
from stillhouse.protos.rows.reading.source import RowReader, RowSource

CODE = """
def rows(argument, *, split, config):
    if argument == "broken":
        raise KeyError("no such page")
    yield {"text": f"{argument} {split} {config}"}
    yield {"prompt": "a", "completion": "b"} if argument == "mixed" else {"text": "b"}
    if argument == "odd":
        yield ["text"]
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A distribution as pip unpacks it: a module, and metadata with an entry point."""
    (tmp_path / "some_wiki.py").write_text(CODE)
    metadata = tmp_path / "some_wiki-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: some-wiki\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[stillhouse.datasets]\nwiki = some_wiki:rows\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("some_wiki", None)


@pytest.mark.usefixtures("package")
def test_rows_come_from_the_package_that_names_their_source() -> None:
    reader = RowReader(RowSource(location="wiki:en/cats", split="train", config="small"))
    assert (reader.container, list(reader)) == (
        "plug-in",
        [(1, {"text": "en/cats train small"}), (2, {"text": "b"})],
    )


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("location", "sentence"),
    [
        ("wiki:broken", r"wiki:broken is read by some_wiki:rows, which failed \(KeyError: 'no such page'\)"),
        ("wiki:odd", r"wiki:odd, row 3, field \(the row\): is an array; it must be a mapping"),
        (
            "wiki:mixed",
            r"wiki:mixed, row 2, field prompt: makes it a row of prompt_completion amid rows of text",
        ),
    ],
)
def test_what_is_wrong_with_a_source_is_told_with_its_name(location: str, sentence: str) -> None:
    with pytest.raises(StillhouseError, match=sentence):
        list(read_file(location))


def test_a_name_that_no_package_has_is_a_path() -> None:
    with pytest.raises(StillhouseError, match="There is no dataset at wiki:en"):
        read_file("wiki:en")
