"""Offline teachers: targets of several teachers from one cache, routed by row or mixed, and complete before training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillhouse.protos.cache.writer import CacheWriter
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.proto import from_proto
from stillhouse.student_trainer.train.batching.supports import mix
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.process.waiting import TeacherWait
from stillhouse.student_trainer.train.teacher.offline_teachers import OfflineTeachers
from stillhouse.student_trainer.train.teacher.query import TargetStream, TeacherQuery, submit_ahead
from stillhouse.student_trainer.train.teacher.run_cache import RunCache
from stillhouse.student_trainer.train.teacher.target_requests import training_request, training_requests
from tests.protos.cache.test_format import PLAIN, VOCAB_SIZE, answer, assert_equal, sequence
from tests.student_trainer.train.runs import make_run

WEIGHTS = {"a": 1.0, "b": 3.0}
METAS = {name: replace(PLAIN, name=name, teacher_fingerprint=name * 64) for name in WEIGHTS}
STUDENT = PLAIN.tokenizer_fingerprint


def examples(*teachers: str) -> list[Example]:
    """One row of each of these teachers."""
    return [
        Example(token_ids=sequence(number), mask=np.arange(12) >= 3, place=f"row {number}", teacher=teacher)
        for number, teacher in enumerate(teachers)
    ]


@contextmanager
def opened(root: Path, rows: list[Example], **further: Any) -> Iterator[tuple[TargetStream, TeacherWait]]:
    """The stream of a run with both teachers, over a cache in `root`."""
    teachers = [{"name": name, "targets": ["here:1"], "weight": each} for name, each in WEIGHTS.items()]
    spec = {
        "student": {"model": "unused"},
        "teachers": teachers,
        "data": {"train": [{"path": "unused.jsonl"}], **further},
        "loss": {"top_k": PLAIN.top_k, "sparse_target": "tail_bucket"},
        "cache": {"path": "caches/set", "mode": "only"},
    }
    run_dir = make_run(root, "offline", spec)
    config = from_proto(run_dir.effective_spec())
    with ExitStack() as stack:
        attempt = stack.enter_context(run_dir.open_attempt(1))
        cache = RunCache.open(config.cache, root, stack)
        assert cache is not None
        source = OfflineTeachers.open(
            config,
            training_requests(config),
            Corpus(train=rows, eval=[], dataset_sizes=[len(rows)]),
            STUDENT,
            run_dir=run_dir,
            cache=cache,
        )
        stream = source.open_stream(training_request(config.loss, 0))
        stack.callback(stream.close)
        yield stream, TeacherWait(attempt, lambda: False, 1.0)


def write(root: Path, rows: list[Example]) -> None:
    """Stores the targets of `rows`, each of its teacher, or of both where it names none."""
    with CacheWriter(root / "caches" / "set") as writer:
        for number, row in enumerate(rows):
            for offset, (name, meta) in enumerate(METAS.items()):
                if row.teacher in ("", name):
                    assert writer.add(meta, row.token_ids, answer(meta, 10 * offset + number))


def test_rows_without_a_name_get_the_mixture_of_all_teachers(tmp_path: Path) -> None:
    rows = examples("", "")
    write(tmp_path, rows)
    with opened(tmp_path, rows) as (stream, wait):
        for number, row in enumerate(rows):
            stream.submit(number, TeacherQuery.from_example(row))
        for number in (1, 0):
            parts = [answer(meta, 10 * offset + number) for offset, meta in enumerate(METAS.values())]
            expected = mix(parts, list(WEIGHTS.values()), vocab_size=VOCAB_SIZE)
            # The cache keeps half precision.
            assert_equal(stream.get_result(number, wait), expected, atol=1e-2)
        assert stream.num_asked == 0


def test_a_row_gets_the_targets_of_the_teacher_that_it_names(tmp_path: Path) -> None:
    rows = examples("b", "a")
    write(tmp_path, rows)
    with opened(tmp_path, rows, teacher_field="teacher") as (stream, wait):
        for number, row in submit_all(stream, rows):
            offset = list(METAS).index(row.teacher)
            expected = answer(METAS[row.teacher], 10 * offset + number)
            assert_equal(stream.get_result(number, wait), expected, atol=1e-2)


def test_a_row_without_targets_is_missed_before_training(tmp_path: Path) -> None:
    rows = examples("b", "a", "a")
    write(tmp_path, rows[:2])
    with (
        pytest.raises(StillhouseError, match=r"1 of 2 sequences, first row 2.*data\.end_text") as error,
        opened(tmp_path, rows, teacher_field="teacher"),
    ):
        pass
    assert error.value.reason is Reason.CACHE_MISS


def test_at_most_a_window_is_submitted_ahead() -> None:
    submitted: list[int] = []
    for index, item in submit_ahead("abcde", 2, lambda number, _: submitted.append(number)):
        assert "abcde"[index] == item
        assert submitted == list(range(min(index + 2, 5)))


def submit_all(stream: TargetStream, rows: list[Example]) -> Iterator[tuple[int, Example]]:
    """Submits the query of every row before the first is yielded."""
    return submit_ahead(
        rows, len(rows), lambda number, row: stream.submit(number, TeacherQuery.from_example(row))
    )
