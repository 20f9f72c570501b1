"""Prepared data is what one process makes that reads row by row, wherever it was encoded and whenever it is read."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from structlog.testing import capture_logs

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import DataConfig, DatasetConfig, EvaluationConfig
from stillhouse.student_trainer.prepared_store import PreparedStore
from stillhouse.student_trainer.train.data.chat.mask import Learned
from stillhouse.student_trainer.train.data.corpus import Corpus, assemble
from stillhouse.student_trainer.train.data.prepared.columns import (
    NAMED,
    BatchBuilder,
    BatchView,
    from_bytes,
)
from stillhouse.student_trainer.train.data.prepared.encoding_run import BLOCK_ROWS, EncodingRun
from stillhouse.student_trainer.train.data.prepared.preparation import Preparer
from stillhouse.student_trainer.train.data.prepared.progress import Progress, Unobserved
from stillhouse.student_trainer.train.data.prepared.settings import ExampleSettings
from stillhouse.student_trainer.train.data.prepared.table import TableWriter
from stillhouse.student_trainer.train.data.prepared.workers import Workers
from stillhouse.student_trainer.train.data.readers import DatasetRow, read_rows
from stillhouse.student_trainer.train.data.teacher_prompt import TeacherPrompt
from tests.student_trainer.train.data.prepared.row_by_row import (
    Expected,
    Plain,
    expected,
    found,
    learning_tokenizer,
    rows_of,
    write,
)
from tests.student_trainer.train.data.tiny_tokenizers import Space, sentence_piece

ALL = EvaluationConfig(limit=10_000)


def _prepare(
    data: DataConfig, tokenizer: Any, folder: Path, teachers: tuple[str, ...] = (), **options: Any
) -> Corpus:
    settings = ExampleSettings(data=data, teachers=teachers)
    with Preparer(settings, tokenizer, folder, store=PreparedStore(folder / "prepared"), **options) as own:
        return assemble(data, ALL, [own.prepare(each) for each in (*data.train, *data.eval)])


def _data(*paths: Path, **settings: Any) -> DataConfig:
    return DataConfig(train=tuple(DatasetConfig(path=str(each)) for each in paths), **settings)


def _names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "prepared").iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("overflow", ["truncate", "drop"])
@pytest.mark.parametrize("kind", ["text", "completion", "chat", "mixed"])
def test_ids_masks_order_and_split_are_those_of_rows_read_one_by_one(
    tmp_path: Path, kind: str, overflow: str
) -> None:
    tokenizer = learning_tokenizer()
    path = write(tmp_path / "rows.jsonl", kind, 700, by=lambda number: "ab"[number % 2])
    settings = {"max_sequence_tokens": 40, "overflow": overflow, "eval_fraction": 0.1, "teacher_field": "by"}
    data = _data(path, **settings)
    wanted = expected(data, tokenizer, tmp_path, ("a", "b"))
    assert 20 < len(wanted.train) + len(wanted.held_out) <= 700
    first = _prepare(data, tokenizer, tmp_path, ("a", "b"))
    assert found(first) == wanted
    with capture_logs() as lines:
        again = _prepare(data, tokenizer, tmp_path, ("a", "b"))
    assert [line["rows"] for line in lines if line["event"] == "data was prepared before"]
    assert found(again) == wanted


@pytest.mark.parametrize("name", get_args(Space))
def test_texts_in_one_call_are_encoded_as_each_alone(tmp_path: Path, name: Any) -> None:
    tokenizer = sentence_piece(name)
    texts = ["<s>Ada has", "Ada", " é", "</s>", "<s>", "Hi </s> ", "\N{GREEN APPLE}\n"]
    pairs = [{"prompt": one, "completion": two} for one in texts for two in texts]
    paths = []
    for number, rows in enumerate(([{"text": each} for each in texts], pairs)):
        paths.append(tmp_path / f"{number}.jsonl")
        paths[-1].write_text("".join(json.dumps(each) + "\n" for each in rows))
    for settings in ({"completion_only": True}, {"completion_only": False, "end_text": False}):
        data = _data(*paths, eval_fraction=0.0, **settings)
        assert found(_prepare(data, tokenizer, tmp_path)) == expected(data, tokenizer, tmp_path)


def test_several_sources_with_limits_are_split_together_and_evaluated_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = learning_tokenizer()
    # Tables of several batches, looked at in parts.
    monkeypatch.setattr("stillhouse.student_trainer.train.data.prepared.table.BATCH_ROWS", 64)
    monkeypatch.setattr("stillhouse.student_trainer.train.data.prepared.rows.AT_ONCE", 50)
    paths = [
        write(tmp_path / f"{kind}.jsonl", kind, 300, first=at * 7)
        for at, kind in enumerate(("text", "chat", "completion"))
    ]
    train = (
        DatasetConfig(path=str(paths[0]), limit=120),
        *(DatasetConfig(path=str(each)) for each in paths[1:]),
    )
    for held_out in ((), (DatasetConfig(path=str(paths[0]), limit=50),)):
        data = DataConfig(
            train=train, eval=held_out, eval_fraction=0.05, max_sequence_tokens=60, overflow="drop"
        )
        for _ in range(2):
            corpus = _prepare(data, tokenizer, tmp_path)
            assert found(corpus) == expected(data, tokenizer, tmp_path)
        longest = max((*corpus.train, *corpus.eval), key=lambda each: len(each.token_ids))
        largest = max((*corpus.train, *corpus.eval), key=lambda each: int(each.token_ids.max()))
        assert Plain.of(corpus.longest) == Plain.of(longest)
        assert Plain.of(corpus.largest) == Plain.of(largest)
    # One table for each dataset and limit, and for what the rows before it told.
    assert len(_names(tmp_path)) == 4


class _Waiting:
    """Rows that wait, behind the first, until other processes encode."""

    def __init__(self, path: Path) -> None:
        self.run: EncodingRun | None = None
        self._path = path

    def __iter__(self) -> Iterator[DatasetRow]:
        dataset = DatasetConfig(path=str(self._path))
        for number, row in enumerate(read_rows(dataset, self._path.parent)):
            deadline = time.monotonic() + 60
            while number == BLOCK_ROWS and not self._ready() and time.monotonic() < deadline:
                time.sleep(0.05)
            yield row

    def _ready(self) -> bool:
        workers = self.run and self.run._workers
        return bool(workers and workers.room)


def _by_processes(path: Path, tokenizer: Any, data: DataConfig) -> tuple[list[Plain], Learned, int]:
    """The examples of a file, all but the first two blocks encoded by other processes, and the number of blocks that they got."""
    rows, examples, learned = _Waiting(path), list[Plain](), Learned()
    settings = ExampleSettings(data=data)
    with EncodingRun(tokenizer, settings, cores=2, observer=Unobserved(), start_after_s=0) as run:
        rows.run = run
        for block in run.blocks(iter(rows), Learned()):
            view = BatchView(from_bytes(block.data))
            examples += [Plain.of(view.example(at, block.names)) for at in range(view.num_rows)]
            learned = block.learned
        return examples, learned, run.num_sent


def test_other_processes_encode_the_same_and_hand_back_what_was_told_too_late(tmp_path: Path) -> None:
    tokenizer = learning_tokenizer()
    # The first conversation comes late: blocks that are encoded by then do not know the end of a turn.
    path, count = tmp_path / "rows.jsonl", 8 * BLOCK_ROWS
    with path.open("w") as file:
        for number in range(count):
            kind = "turns" if number == 5 * BLOCK_ROWS + 3 else "ended"
            file.write(json.dumps(rows_of(kind, number)) + "\n")
    data = _data(path, eval_fraction=0.0)
    wanted = expected(data, tokenizer, tmp_path)
    examples, learned, num_sent = _by_processes(path, tokenizer, data)
    assert num_sent == 6
    assert learned.marks
    assert examples == wanted.train


def test_the_first_bad_row_is_named_wherever_it_is_encoded(tmp_path: Path) -> None:
    tokenizer = learning_tokenizer()
    lines = [json.dumps(rows_of("text", number)) for number in range(6 * BLOCK_ROWS)]
    for bad in ((4 * BLOCK_ROWS, '{"text": 3}'), (5 * BLOCK_ROWS, "{")):
        lines[bad[0]] = bad[1]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(
        StillhouseError, match=f"row {4 * BLOCK_ROWS + 1}, field text: is the number 3"
    ) as error:
        _by_processes(path, tokenizer, _data(path))
    assert error.value.reason is Reason.DATASET_INVALID
    lines[4 * BLOCK_ROWS] = lines[0]
    path.write_text("\n".join(lines))
    with pytest.raises(StillhouseError, match=rf"row {5 * BLOCK_ROWS + 1}, field \(the line\): is not JSON"):
        _prepare(_data(path), tokenizer, tmp_path)
    assert _names(tmp_path) == set()


def test_whatever_decides_the_examples_decides_the_name(tmp_path: Path) -> None:
    tokenizer = learning_tokenizer()
    path = write(tmp_path / "rows.jsonl", "completion", 40)
    _prepare(_data(path), tokenizer, tmp_path)
    # Neither split, order nor date changes what a row is here.
    for same in ({"seed": 3}, {"eval_fraction": 0.5}, {"packing": True}, {"date": "2025-01-31"}):
        _prepare(_data(path, **same), tokenizer, tmp_path)
        assert len(_names(tmp_path)) == 1, same
    others: list[dict[str, Any]] = [
        {"max_sequence_tokens": 30},
        {"overflow": "drop"},
        {"completion_only": False},
        {"chat": True},
        {"end_text": False},
        {"extra_fields": "refuse"},
    ]
    for number, other in enumerate(others, start=2):
        _prepare(_data(path, **other), tokenizer, tmp_path)
        assert len(_names(tmp_path)) == number, other
    tokenizer.chat_template = tokenizer.chat_template.replace(":", "-")
    _prepare(_data(path), tokenizer, tmp_path)
    assert len(_names(tmp_path)) == len(others) + 2
    # The same size and, after a moment, the same times: the bytes decide.
    before = path.stat()
    path.write_text(path.read_text().replace("apples", "pliers"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    corpus = _prepare(_data(path), tokenizer, tmp_path)
    assert "pliers" in tokenizer.decode(corpus.train[0].token_ids)
    assert len(_names(tmp_path)) == len(others) + 3


def test_a_date_that_a_template_writes_decides_too(tmp_path: Path) -> None:
    tokenizer = learning_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + tokenizer.chat_template
    path = write(tmp_path / "rows.jsonl", "chat", 20)
    texts = []
    for number, day in enumerate(("2025-01-31", "2025-02-01", "2025-01-31")):
        corpus = _prepare(_data(path, date=day), tokenizer, tmp_path)
        assert corpus.template_date == day
        texts.append(tokenizer.decode(corpus.train[0].token_ids)[:11])
        assert len(_names(tmp_path)) == min(number + 1, 2)
    assert texts == ["31 Jan 2025", "01 Feb 2025", "31 Jan 2025"]
    # Without a date it is the time of the attempt: no later run takes that.
    for number in (3, 4):
        _prepare(_data(path), tokenizer, tmp_path)
        assert len(_names(tmp_path)) == number


def test_progress_tells_rows_rate_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillhouse.student_trainer.train.data.prepared.progress.FIRST_S", 0.0)
    monkeypatch.setattr("stillhouse.student_trainer.train.data.prepared.progress.TOLD_S", 0.0)
    told: list[Progress | None] = []

    class Observer(Unobserved):
        def progress(self, progress: Progress | None) -> None:
            told.append(progress)

    path = write(tmp_path / "rows.jsonl", "text", 3 * BLOCK_ROWS)
    with capture_logs() as lines:
        _prepare(_data(path), learning_tokenizer(), tmp_path, observer=Observer())
    assert [each and (each.rows, each.total) for each in told] == [
        (BLOCK_ROWS, 3 * BLOCK_ROWS),
        (2 * BLOCK_ROWS, 3 * BLOCK_ROWS),
        (3 * BLOCK_ROWS, 3 * BLOCK_ROWS),
        None,
    ]
    first = told[0]
    assert first is not None
    assert first.left_s == pytest.approx(2 * first.seconds)
    (line,) = [line for line in lines if line["event"] == "data prepared"]
    assert line["rows"] == line["of"] == 3 * BLOCK_ROWS


def test_an_observer_ends_a_preparation_and_nothing_is_left(tmp_path: Path) -> None:
    class Stopping(Unobserved):
        calls = 0

        def check(self) -> None:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt

    path = write(tmp_path / "rows.jsonl", "text", 5 * BLOCK_ROWS)
    with pytest.raises(KeyboardInterrupt):
        _prepare(_data(path), learning_tokenizer(), tmp_path, observer=Stopping())
    left = [each.name for each in (tmp_path / "prepared").iterdir()]
    assert all(name.startswith((".turn-", ".contents")) for name in left)


def test_an_empty_dataset_is_refused_as_before(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(StillhouseError, match=r"data\.train has no rows"):
        _prepare(_data(tmp_path / "rows.jsonl"), learning_tokenizer(), tmp_path)
    with pytest.raises(StillhouseError, match="There is no dataset at") as error:
        _prepare(_data(tmp_path / "none.jsonl"), learning_tokenizer(), tmp_path)
    assert error.value.reason is Reason.DATASET_NOT_FOUND


def test_slices_and_choices_of_teachers_read_the_rows_that_they_name(tmp_path: Path) -> None:
    tokenizer = learning_tokenizer()
    path = write(tmp_path / "rows.jsonl", "text", 300, by=lambda number: ("a", "b", "c")[number % 3])
    data = _data(path, teacher_field="by", eval_fraction=0.1)
    corpus = _prepare(data, tokenizer, tmp_path, ("a", "b", "c"))
    wanted: Expected = expected(data, tokenizer, tmp_path, ("a", "b", "c"))
    train = corpus.train
    assert [Plain.of(each) for each in train[17:60][3:-2]] == wanted.train[17:60][3:-2]
    assert Plain.of(train[-1]) == wanted.train[-1]
    with pytest.raises(IndexError):
        train[len(train)]
    chosen = train[40:200].of_teachers("", "b")  # type: ignore[attr-defined]
    assert [Plain.of(each) for each in chosen] == [
        each for each in wanted.train[40:200] if each.teacher == "b"
    ]


def test_without_room_for_processes_this_one_encodes_alone() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    tokenizer, settings = learning_tokenizer(), ExampleSettings(data=DataConfig())
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use, hard))
    try:
        workers = Workers(tokenizer, settings, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with workers:
        assert workers.room == 0


def test_tokens_of_teachers_prompts_close_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillhouse.student_trainer.train.data.prepared.table.BATCH_TOKENS", 100)
    writer = TableWriter()
    for number in range(2):
        builder = BatchBuilder()
        prompt = TeacherPrompt(np.arange(100, dtype=np.int32), 1)
        mask = np.array([False, True])
        builder.add([1, 2], mask, num_prompt=1, path="a", number=number, teacher="", prompts={"": prompt})
        writer.add(builder.finish(), {name: builder.names[name].names for name in NAMED})
    assert [batch.num_rows for batch in writer.close()] == [1, 1]
