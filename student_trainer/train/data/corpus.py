"""The run's text as token ids: read once at the start, cut to length, and split the same way every time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import (
    MAX_SPLIT_ROWS,
    DataConfig,
    DatasetConfig,
    EvaluationConfig,
)
from stillhouse.student_trainer.train.data.cached_texts import cached_examples, is_cache
from stillhouse.student_trainer.train.data.encoding import Encoder, Example, num_prompt_tokens
from stillhouse.student_trainer.train.data.readers import Row, read_rows, resolve

log = structlog.get_logger()

_SPLIT_STREAM = 1
"""Distinguishes the draw of the split from those of the orders, which have the same seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Examples to learn from, and held-out ones."""

    train: Sequence[Example]
    eval: Sequence[Example]
    """May be empty."""
    parts: Sequence[int]
    """How many of `train`, in their order, come from each dataset."""

    @property
    def longest(self) -> Example:
        """The example with the most tokens."""
        return max((*self.train, *self.eval), key=lambda example: len(example.token_ids))

    @property
    def largest(self) -> Example:
        """The example with the largest token id."""
        return max((*self.train, *self.eval), key=lambda example: int(example.token_ids.max()))


def load_corpus(
    data: DataConfig,
    evaluation: EvaluationConfig,
    tokenizer: Any,
    data_dir: Path,
    teachers: Sequence[str] = (),
) -> Corpus:
    """The examples of `data`, encoded with the student's tokenizer; `teachers` are the names that rows may give.

    Raises:
        StillhouseError: DATASET_NOT_FOUND or DATASET_INVALID, also where nothing is left to learn from.
    """
    encoder = Encoder(tokenizer, completion_only=data.completion_only)
    parts = [_read(dataset, data, encoder, data_dir, teachers) for dataset in data.train]
    train = [example for part in parts for example in part]
    held_out = [
        example for dataset in data.eval for example in _read(dataset, data, encoder, data_dir, teachers)
    ]
    if not data.eval:
        chosen = _held_out(len(train), data)
        held_out = [example for index, example in enumerate(train) if index in chosen]
        ends = np.cumsum([len(part) for part in parts])
        parts = [
            [each for index, each in enumerate(part, start=end - len(part)) if index not in chosen]
            for part, end in zip(parts, ends, strict=True)
        ]
        train = [example for part in parts for example in part]
    if not train:
        raise StillhouseError(
            Reason.DATASET_INVALID,
            f"data.train has no row that can be learnt from within {data.max_sequence_tokens} tokens. "
            "Raise data.max_sequence_tokens, or give rows with completions.",
        )
    log.info("data read", train_rows=len(train), eval_rows=len(held_out))
    return Corpus(train=train, eval=held_out[: evaluation.limit], parts=[len(part) for part in parts])


def _read(
    dataset: DatasetConfig, data: DataConfig, encoder: Encoder, data_dir: Path, teachers: Sequence[str]
) -> list[Example]:
    read = _Reader(data, encoder, teachers)
    examples = list(read.examples(dataset, data_dir))
    if read.too_long or read.nothing_to_learn:
        log.warning(
            "rows left out",
            path=dataset.path,
            too_long=read.too_long,
            nothing_to_learn=read.nothing_to_learn,
        )
    return examples


class _Reader:
    """Encodes one source and counts what it leaves out."""

    def __init__(self, data: DataConfig, encoder: Encoder, teachers: Sequence[str]) -> None:
        self._data = data
        self._encoder = encoder
        self._teachers = teachers
        self.too_long = 0
        self.nothing_to_learn = 0

    def examples(self, dataset: DatasetConfig, data_dir: Path) -> Iterator[Example]:
        path = resolve(dataset.path, data_dir)
        if is_cache(path):
            yield from self._cached(path, dataset.limit)
            return
        limit = self._data.max_sequence_tokens
        for row in read_rows(dataset, data_dir):
            token_ids, written = self._encoder.mark(row)
            mask = self._encoder.targets(written)
            if len(token_ids) > limit and self._data.overflow == "drop":
                self.too_long += 1
            elif not any(mask[:limit]):
                self.nothing_to_learn += 1
            else:
                yield Example(
                    token_ids=np.asarray(token_ids[:limit], np.int32),
                    mask=np.asarray(mask[:limit], np.bool_),
                    place=f"{row.path}, row {row.number}",
                    num_prompt=num_prompt_tokens(written[:limit]),
                    teacher=self._teacher(row),
                )

    def _cached(self, path: Path, limit: int | None) -> Iterator[Example]:
        """Texts of a cache, as they are: cut ones would have no answer in it."""
        found = cached_examples(path, self._encoder.fingerprint, routed=bool(self._data.teacher_field))
        for example in itertools.islice(found, limit):
            if len(example.token_ids) > self._data.max_sequence_tokens:
                self.too_long += 1
            else:
                yield example

    def _teacher(self, row: Row) -> str:
        """The name that the row gives in `data.teacher_field`. Raises StillhouseError(DATASET_INVALID)."""
        field = self._data.teacher_field
        if not field:
            return ""
        name = row.text(field)
        if name not in self._teachers:
            raise row.invalid(
                field, f'is "{name}", which no teacher is called; there are {", ".join(self._teachers)}.'
            )
        return name


def _held_out(num_rows: int, data: DataConfig) -> set[int]:
    """Which of the rows are held out; drawn by `data.seed` alone."""
    if data.eval_fraction == 0 or num_rows < 2:
        return set()
    count = min(MAX_SPLIT_ROWS, max(1, round(data.eval_fraction * num_rows)), num_rows - 1)
    generator = np.random.Generator(np.random.PCG64([data.seed, _SPLIT_STREAM]))
    return set(generator.permutation(num_rows)[:count].tolist())
