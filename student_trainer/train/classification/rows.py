"""Rows of a classifier as token ids with labels: `text`, `text_pair` and `label`, read, truncated and split deterministically."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.field_error import FieldError, kind_of
from stillhouse.protos.rows.known_fields import LABELS, check_fields
from stillhouse.student_trainer.config.rules.evaluation import settled_sets
from stillhouse.student_trainer.config.schema import MAX_SPLIT_ROWS, DataConfig, DatasetConfig, RunConfig
from stillhouse.student_trainer.train.data.cached_texts import is_cache
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.data.evaluation_sets import EvaluationRows
from stillhouse.student_trainer.train.data.readers import DatasetRow, read_rows, resolve

log = structlog.get_logger()

TEXT, PAIR, LABEL = "text", "text_pair", "label"
BATCH_ROWS = 1000
"""Rows that are tokenised together."""

_SPLIT_STREAM = 1
"""Separates the random numbers of the split from those of the row order, which has the same seed."""

Label = str | int


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledExample(Example):
    """One text, or pair of texts, of a classifier; `mask` names its last token, where teachers' class rows stand."""

    label: Label | None
    """As the row has it: the name of a class, or a number; None if rows have none."""


def load_labelled(
    config: RunConfig, tokenizer: Any, data_dir: Path
) -> tuple[Corpus, Sequence[EvaluationRows]]:
    """Reads and encodes the examples of `config.data` with the student's tokenizer, and the rows of evaluation sets, which
    stand behind the held-out ones in the places that are returned.

    Raises StillhouseError: DATASET_NOT_FOUND; DATASET_INVALID for a row without text, with a label that is neither text nor
    a whole number, or without one where others have it or the loss needs it.
    """
    reader = _Reader(config, tokenizer, data_dir)
    parts = [reader.read(dataset) for dataset in config.data.train]
    held_out = [example for dataset in config.data.eval for example in reader.read(dataset)]
    if not config.data.eval:
        chosen = _held_out_rows(sum(map(len, parts)), config.data)
        held_out, parts = _split(parts, chosen)
    train = [example for part in parts for example in part]
    if not train:
        raise StillhouseError(
            Reason.DATASET_INVALID,
            f"data.train has no row within {config.data.max_sequence_tokens} tokens. Raise data.max_sequence_tokens, or give "
            f"rows with {TEXT} and {LABEL}.",
        )
    log.info("data read", train_rows=len(train), eval_rows=len(held_out), labelled=train[0].label is not None)
    rows = held_out[: config.evaluation.limit]
    own, *named = settled_sets(config)
    sets = [EvaluationRows(settings=own, begin=0, end=len(rows))]
    for settings, each in zip(named, config.evaluation.sets, strict=True):
        found = reader.read(DatasetConfig(path=each.path, limit=each.limit))
        if not found:
            raise StillhouseError(
                Reason.DATASET_INVALID,
                f"{each.path} has no row within {config.data.max_sequence_tokens} tokens, which {settings.field} needs. Raise "
                f"data.max_sequence_tokens, or give rows with {TEXT} and {LABEL}.",
            )
        sets.append(EvaluationRows(settings=settings, begin=len(rows), end=len(rows) + len(found)))
        rows = [*rows, *found]
        log.info("evaluation set read", set=settings.name, rows=len(found))
    return Corpus(train=train, eval=rows, dataset_sizes=[len(part) for part in parts]), sets


def _held_out_rows(num_rows: int, data: DataConfig) -> set[int]:
    """Numbers of the rows that `data.eval_fraction` holds out, from `data.seed` alone."""
    if data.eval_fraction == 0 or num_rows < 2:
        return set()
    count = min(MAX_SPLIT_ROWS, max(1, round(data.eval_fraction * num_rows)), num_rows - 1)
    generator = np.random.Generator(np.random.PCG64([data.seed, _SPLIT_STREAM]))
    return set(generator.permutation(num_rows)[:count].tolist())


def _split(
    parts: Sequence[Sequence[LabelledExample]], chosen: set[int]
) -> tuple[list[LabelledExample], list[list[LabelledExample]]]:
    """The rows whose number over all parts is chosen, and the parts without them."""
    held_out: list[LabelledExample] = []
    rest: list[list[LabelledExample]] = []
    number = 0
    for part in parts:
        kept: list[LabelledExample] = []
        for example in part:
            (held_out if number in chosen else kept).append(example)
            number += 1
        rest.append(kept)
    return held_out, rest


class _Reader:
    """Reads and encodes datasets; all rows of a run have a label, or none has."""

    def __init__(self, config: RunConfig, tokenizer: Any, data_dir: Path) -> None:
        self._data: DataConfig = config.data
        self._teachers = [each.name for each in config.teachers]
        self._needs_label = any(config.loss_of(each).hard_weight > 0 for each in config.contexts)
        self._tokenizer = tokenizer
        self._data_dir = data_dir
        self._first: tuple[str, bool] | None = None
        """Place of the first row, and whether it has a label."""

    def read(self, dataset: DatasetConfig) -> list[LabelledExample]:
        """The examples of a dataset; logs the number of rows that are left out."""
        path = resolve(dataset.path, self._data_dir)
        if is_cache(path):
            raise StillhouseError(
                Reason.DATASET_INVALID,
                f"{path} is a cache, which holds no labels. Name the rows in data.train, and the cache in cache.path.",
            )
        examples, num_too_long = [], 0
        found = read_rows(dataset, self._data_dir)
        while rows := list(islice(found, BATCH_ROWS)):
            for example in self._encoded(rows):
                if len(example.token_ids) > self._data.max_sequence_tokens:
                    num_too_long += 1
                else:
                    examples.append(example)
        if num_too_long:
            log.warning("rows left out", path=dataset.path, too_long=num_too_long)
        return examples

    def _encoded(self, rows: Sequence[DatasetRow]) -> Iterator[LabelledExample]:
        texts, pairs, labels, teachers = [], [], [], []
        for row in rows:
            self._check_fields(row)
            texts.append(_text(row, TEXT))
            pairs.append(_text(row, PAIR) if row.values.get(PAIR) is not None else None)
            labels.append(self._label(row))
            teachers.append(self._teacher(row))
        found = self._tokenize(texts, pairs)
        for row, (token_ids, types), label, teacher in zip(rows, found, labels, teachers, strict=True):
            if not len(token_ids):
                raise row.invalid(TEXT, "has no tokens; remove the row.")
            mask = np.zeros(len(token_ids), np.bool_)
            mask[-1] = True
            yield LabelledExample(
                token_ids=token_ids,
                mask=mask,
                place=f"{row.path}, row {row.number}",
                teacher=teacher,
                token_type_ids=types,
                label=label,
            )

    def _tokenize(
        self, texts: Sequence[str], pairs: Sequence[str | None]
    ) -> Iterator[tuple[NDArray[np.int32], NDArray[np.int32] | None]]:
        """Token ids and segments of each row; segments are None where all tokens have the same."""
        limit = self._data.max_sequence_tokens if self._data.overflow == "truncate" else None
        for text, pair in zip(texts, pairs, strict=True):
            special = self._tokenizer.num_special_tokens_to_add(pair is not None)
            if self._data.max_sequence_tokens <= special:
                raise StillhouseError(
                    Reason.INVALID_SPEC,
                    f"data.max_sequence_tokens is {self._data.max_sequence_tokens}, and the tokenizer adds {special} tokens to each "
                    "text; raise it.",
                )
            encoded = self._tokenizer(text, pair, truncation=limit is not None, max_length=limit)
            token_ids = np.asarray(encoded["input_ids"], np.int32)
            types = np.asarray(encoded.encodings[0].type_ids, np.int32)
            yield token_ids, types if types.any() else None

    def _check_fields(self, row: DatasetRow) -> None:
        own = [self._data.teacher_field] if self._data.teacher_field else []
        try:
            check_fields(
                row.values,
                known={TEXT, PAIR, LABEL, *LABELS, *own},
                no_effect={},
                extra="refuse" if self._data.extra_fields == "refuse" else "keep",
            )
        except FieldError as error:
            raise row.invalid(error.field, error.problem) from error

    def _label(self, row: DatasetRow) -> Label | None:
        value = row.values.get(LABEL)
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
            raise row.invalid(
                LABEL, f"is {kind_of(value)}; it must be the name of a class, or its number from 0."
            )
        if value is None and self._needs_label:
            raise row.invalid(
                LABEL, "is missing, and loss.hard_weight trains on it. Add it, or set that to 0."
            )
        place = f"row {row.number} of {row.path}"
        if self._first is None:
            self._first = (place, value is not None)
        first, has_label = self._first
        if has_label != (value is not None):
            problem = "is missing" if has_label else "is given"
            raise row.invalid(
                LABEL, f"{problem}, unlike that of {first}. Give every row of a run a label, or none."
            )
        return value

    def _teacher(self, row: DatasetRow) -> str:
        field = self._data.teacher_field
        if not field:
            return ""
        name = row.text(field)
        if name not in self._teachers:
            raise row.invalid(
                field, f'is "{name}", which no teacher is called; there are {", ".join(self._teachers)}.'
            )
        return name


def _text(row: DatasetRow, field: str) -> str:
    text = row.text(field)
    if not text.strip():
        raise row.invalid(field, "is empty; remove the row or fill it.")
    return text
