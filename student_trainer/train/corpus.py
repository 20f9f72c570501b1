"""The run's text as token ids: read once at the start, cut to length, and split the same way every time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from protos.errors import Reason, StillhouseError
from student_trainer.config import MAX_SPLIT_ROWS, DataConfig, DatasetConfig, EvaluationConfig
from student_trainer.train.prompts import Encoder, Example
from student_trainer.train.rows import read_rows

log = structlog.get_logger()

_SPLIT_STREAM = 1
"""Distinguishes the draw of the split from those of the orders, which have the same seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Examples to learn from, and held-out ones."""

    train: Sequence[Example]
    eval: Sequence[Example]
    """May be empty."""

    @property
    def longest(self) -> Example:
        """The example with the most tokens."""
        return max((*self.train, *self.eval), key=lambda example: len(example.token_ids))


def load_corpus(data: DataConfig, evaluation: EvaluationConfig, tokenizer: Any, data_dir: Path) -> Corpus:
    """The examples of `data`, encoded with the student's tokenizer.

    Raises:
        StillhouseError: DATASET_NOT_FOUND or DATASET_INVALID, also where nothing is left to learn from.
    """
    encoder = Encoder(tokenizer, completion_only=data.completion_only)
    train = _read(data.train, data, encoder, data_dir)
    held_out = _read(data.eval, data, encoder, data_dir) if data.eval else []
    if not data.eval:
        train, held_out = _split(train, data)
    if not train:
        raise StillhouseError(
            Reason.DATASET_INVALID,
            f"data.train has no row that can be learnt from within {data.max_sequence_tokens} tokens. "
            "Raise data.max_sequence_tokens, or give rows with completions.",
        )
    log.info("data read", train_rows=len(train), eval_rows=len(held_out))
    return Corpus(train=train, eval=held_out[: evaluation.limit])


def _read(
    datasets: Sequence[DatasetConfig], data: DataConfig, encoder: Encoder, data_dir: Path
) -> list[Example]:
    examples: list[Example] = []
    for dataset in datasets:
        read = _Reader(data, encoder)
        examples.extend(read.examples(dataset, data_dir))
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

    def __init__(self, data: DataConfig, encoder: Encoder) -> None:
        self._data = data
        self._encoder = encoder
        self.too_long = 0
        self.nothing_to_learn = 0

    def examples(self, dataset: DatasetConfig, data_dir: Path) -> Iterator[Example]:
        limit = self._data.max_sequence_tokens
        for row in read_rows(dataset, data_dir):
            token_ids, mask = self._encoder.encode(row)
            if len(token_ids) > limit and self._data.overflow == "drop":
                self.too_long += 1
            elif not any(mask[:limit]):
                self.nothing_to_learn += 1
            else:
                yield Example(
                    token_ids=np.asarray(token_ids[:limit], np.int32),
                    mask=np.asarray(mask[:limit], np.bool_),
                    place=f"{row.path}, row {row.number}",
                )


def _split(examples: list[Example], data: DataConfig) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, each in file order; drawn by `data.seed` alone."""
    if data.eval_fraction == 0 or len(examples) < 2:
        return examples, []
    count = min(MAX_SPLIT_ROWS, max(1, round(data.eval_fraction * len(examples))), len(examples) - 1)
    generator = np.random.Generator(np.random.PCG64([data.seed, _SPLIT_STREAM]))
    chosen = set(generator.permutation(len(examples))[:count].tolist())
    train = [example for index, example in enumerate(examples) if index not in chosen]
    held_out = [example for index, example in enumerate(examples) if index in chosen]
    return train, held_out
