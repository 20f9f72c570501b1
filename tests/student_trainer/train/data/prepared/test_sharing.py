"""Prepared data that several runs and hosts use: damaged, waited for, changed while it was read, of other rows elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from structlog.testing import capture_logs

from stillhouse.protos.errors import StillhouseError
from stillhouse.student_trainer.prepared_store import PreparedStore
from stillhouse.student_trainer.train.data.prepared.columns import SCHEMA
from stillhouse.student_trainer.train.data.prepared.preparation import Preparer, check_equal
from stillhouse.student_trainer.train.data.prepared.progress import Unobserved
from stillhouse.student_trainer.train.data.prepared.settings import ExampleSettings
from tests.student_trainer.train.data.prepared.row_by_row import found, learning_tokenizer, write
from tests.student_trainer.train.data.prepared.test_preparation import _data, _names, _prepare


def _damage(file: Path, column: str) -> None:
    """Writes another value amid the integers of a column of the table, whose size stays."""
    data = bytearray(file.read_bytes())
    batch = pa.ipc.open_file(pa.py_buffer(data)).get_batch(0)
    array = batch.column(column)
    buffer = array.buffers()[1]  # offsets of a list, else values
    begin = buffer.address - pa.py_buffer(data).address
    data[begin + 4 : begin + 8] = (1 << 30).to_bytes(4, "little")
    file.write_bytes(data)


@pytest.mark.parametrize("is_held", [False, True])
@pytest.mark.parametrize(
    "damage",
    [
        *("truncated", "no manifest", "no table", "other columns", "token_ids", "mask", "num_prompt"),
        *("path", "prompt_sizes", "prompt_ids"),
    ],
)
def test_damaged_files_are_prepared_again(tmp_path: Path, damage: str, is_held: bool) -> None:
    tokenizer = learning_tokenizer()
    path = write(tmp_path / "rows.jsonl", "completion", 40)
    wanted = found(_prepare(_data(path), tokenizer, tmp_path))
    (name,) = _names(tmp_path)
    folder = tmp_path / "prepared" / name
    # A process that reads the folder, as another run may.
    holder = PreparedStore(tmp_path / "prepared").open(name) if is_held else None
    if damage in SCHEMA.names:
        _damage(folder / "rows.arrow", damage)
    elif damage == "truncated":
        os.truncate(folder / "rows.arrow", 100)
    elif damage == "no manifest":
        (folder / "prepared.json").unlink()
    elif damage == "no table":
        (folder / "rows.arrow").unlink()
    else:
        size = (folder / "rows.arrow").stat().st_size
        (folder / "rows.arrow").write_bytes(b"x" * size)
    assert found(_prepare(_data(path), tokenizer, tmp_path)) == wanted
    assert len(_names(tmp_path)) == (1 if holder is None else 2)
    if holder is not None:
        holder.close()
        assert found(_prepare(_data(path), tokenizer, tmp_path)) == wanted
        PreparedStore(tmp_path / "prepared").clean(max_bytes=1 << 30, keep_days=30)
    assert _names(tmp_path) == {name}


def test_who_waited_for_another_run_does_not_prepare_again(tmp_path: Path) -> None:
    tokenizer, data = learning_tokenizer(), _data(write(tmp_path / "rows.jsonl", "completion", 40))
    store = _TurnAfterWork(tmp_path / "prepared")
    with Preparer(
        ExampleSettings(data=data), tokenizer, tmp_path, store=PreparedStore(store.folder)
    ) as other:
        store.work = lambda: other.prepare(data.train[0])
        with (
            Preparer(ExampleSettings(data=data), tokenizer, tmp_path, store=store) as own,
            capture_logs() as lines,
        ):
            assert len(own.prepare(data.train[0]).table) > 0
    assert lines[-1]["event"] == "data was prepared before"


class _TurnAfterWork(PreparedStore):
    """Gives the turn right after another run has done the work."""

    work: Callable[[], object]

    @contextmanager
    def turn(self, name: str) -> Iterator[bool]:
        self.work()
        with super().turn(name) as is_mine:
            yield is_mine


def test_other_rows_on_another_host_are_told_and_the_same_are_not(tmp_path: Path) -> None:
    """Each host has a data directory of its own."""
    tokenizer = learning_tokenizer()
    digests = []
    for host, first in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / host).mkdir()
        path = write(tmp_path / host / "rows.jsonl", "mixed", 40, first=first)
        data = _data(path)
        store = PreparedStore(path.parent / "prepared")
        for _ in range(2):  # made, and opened
            with Preparer(ExampleSettings(data=data), tokenizer, path.parent, store=store) as own:
                digest = own.reopen("unknown", data.train[0]).digest
        digests.append([digest])
    check_equal(digests[:2], data.train)
    with pytest.raises(StillhouseError, match=r"rows.jsonl has other rows on the host of process 2"):
        check_equal(digests, data.train)


class _Editor(Unobserved):
    """Changes a file once the preparation has begun."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._is_done = False

    def check(self) -> None:
        if not self._is_done:
            self._is_done = True
            self._path.write_text(self._path.read_text().replace("apples", "pliers"))


def test_no_other_run_takes_what_was_read_while_its_file_changed(tmp_path: Path) -> None:
    tokenizer = learning_tokenizer()
    path = write(tmp_path / "rows.jsonl", "completion", 40)
    before = path.read_text()
    changed = _prepare(_data(path), tokenizer, tmp_path, observer=_Editor(path))
    assert "pliers" in tokenizer.decode(changed.train[0].token_ids)
    (own,) = _names(tmp_path)
    assert own.startswith("own-")
    path.write_text(before)
    corpus = _prepare(_data(path), tokenizer, tmp_path)
    assert "apples" in tokenizer.decode(corpus.train[0].token_ids)
