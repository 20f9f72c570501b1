"""The run's text as token ids: read once at the start, truncated, and split deterministically."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.rules.teacher_prompt import prompt_fields
from stillhouse.student_trainer.config.schema import (
    MAX_SPLIT_ROWS,
    DataConfig,
    DatasetConfig,
    EvaluationConfig,
)
from stillhouse.student_trainer.config.teacher import TeacherConfig
from stillhouse.student_trainer.train.data.cached_texts import cached_examples, is_cache
from stillhouse.student_trainer.train.data.encoding import Example, RowEncoder, num_prompt_tokens
from stillhouse.student_trainer.train.data.prompt_encoding import TeacherPromptEncoder
from stillhouse.student_trainer.train.data.readers import DatasetRow, read_rows, resolve

log = structlog.get_logger()

_SPLIT_STREAM = 1
"""Separates the random numbers of the split from those of the row order, which has the same seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Training and held-out examples."""

    train: Sequence[Example]
    eval: Sequence[Example]
    """May be empty."""
    dataset_sizes: Sequence[int]
    """Number of rows of `train` from each dataset, in order."""
    end_ids: Sequence[int] = ()
    """Tokens that end a text or a turn in the data, ascending."""
    template_date: str = ""
    """Day that the chat template wrote into the text, such as 2025-01-31; empty if it wrote none."""

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
    *,
    prompted: Sequence[TeacherConfig] = (),
) -> Corpus:
    """Reads and encodes the examples of `data` with the student's tokenizer; `teachers` are the names that rows may give.

    The prompts that those of `prompted` see alone are encoded beside them.

    Raises:
        StillhouseError: DATASET_NOT_FOUND or DATASET_INVALID, also if no row is left to train on.
    """
    encoder = RowEncoder.of(data, tokenizer, own_fields=_prompt_fields(prompted))
    prompts = TeacherPromptEncoder(prompted, encoder)
    reader = _DatasetReader(data, encoder, data_dir, teachers, prompts)
    parts = [reader.read(dataset) for dataset in data.train]
    train = [example for part in parts for example in part]
    left_out = reader.left_out.copy()
    held_out = [example for dataset in data.eval for example in reader.read(dataset)]
    if not data.eval:
        chosen = _held_out_rows(len(train), data)
        held_out = [example for index, example in enumerate(train) if index in chosen]
        ends = np.cumsum([len(part) for part in parts])
        parts = [
            [each for index, each in enumerate(part, start=end - len(part)) if index not in chosen]
            for part, end in zip(parts, ends, strict=True)
        ]
        train = [example for part in parts for example in part]
    if not train and data.train:
        raise StillhouseError(Reason.DATASET_INVALID, _nothing_left(left_out, data.max_sequence_tokens))
    log.info("data read", train_rows=len(train), eval_rows=len(held_out))
    sizes = [len(part) for part in parts]
    return Corpus(
        train=train,
        eval=held_out[: evaluation.limit],
        dataset_sizes=sizes,
        end_ids=encoder.end_ids,
        template_date=data.date if encoder.wrote_date else "",
    )


def _prompt_fields(teachers: Sequence[TeacherConfig]) -> set[str]:
    """Lists the fields of rows that prompts of teachers read."""
    return set().union(*(prompt_fields(each.prompt) for each in teachers if each.prompt is not None))


_NOTES = {
    "rewritten_turns": "turns are not learnt: the chat template writes them in another way once turns follow, such as without "
    "their thoughts",
    "unprompted_turns": "turns do not begin with the generation prompt of the chat template",
    "unended_turns": "turns have no token at their end, so the student learns none there",
    "doubled_openings": "texts spell the beginning-of-text token that is added to each: one of the two was dropped",
}
"""Sentences of the log about counts of RowEncoder.notes."""


class _DatasetReader:
    """Reads and encodes datasets."""

    def __init__(
        self,
        data: DataConfig,
        encoder: RowEncoder,
        data_dir: Path,
        teachers: Sequence[str],
        prompts: TeacherPromptEncoder,
    ) -> None:
        self._data = data
        self._encoder = encoder
        self._data_dir = data_dir
        self._teachers = teachers
        self._prompts = prompts
        self.left_out: Counter[_LeftOut] = Counter()
        """Rows so far without an example, by cause."""
        self._told: Counter[str] = Counter()

    def read(self, dataset: DatasetConfig) -> list[Example]:
        """The examples of a dataset; logs the number of rows that are left out."""
        before = self.left_out.copy()
        examples = list(self._examples(dataset))
        if left_out := self.left_out - before:
            counts = {str(cause): count for cause, count in left_out.items()}
            log.warning("rows left out", path=dataset.path, **counts)
        for name, count in self._encoder.notes.items():
            if count > self._told[name]:
                log.warning(_NOTES[name], path=dataset.path, number=count - self._told[name])
                self._told[name] = count
        return examples

    def _examples(self, dataset: DatasetConfig) -> Iterator[Example]:
        path = resolve(dataset.path, self._data_dir)
        if is_cache(path):
            yield from self._cached(path, dataset.limit)
            return
        max_tokens = self._data.max_sequence_tokens
        for row in read_rows(dataset, self._data_dir):
            token_ids, completion_mask = self._encoder.encode_with_completion_mask(row)
            mask = self._encoder.target_mask(completion_mask)
            teacher = self._teacher(row)
            prompts = self._prompts.encode(row, token_ids, completion_mask, teacher)
            room = self._prompts.room(prompts)
            limit = max_tokens if room is None else min(max_tokens, max(room, 0))
            if len(token_ids) > limit and self._data.overflow == "drop":
                self.left_out["too_long"] += 1
            elif not any(mask[:limit]):
                self.left_out[_why_left_out(row, mask)] += 1
            else:
                yield Example(
                    token_ids=np.asarray(token_ids[:limit], np.int32),
                    mask=np.asarray(mask[:limit], np.bool_),
                    place=f"{row.path}, row {row.number}",
                    num_prompt=num_prompt_tokens(completion_mask[:limit]),
                    teacher=teacher,
                    teacher_prompts=prompts,
                )

    def _cached(self, path: Path, limit: int | None) -> Iterator[Example]:
        """Yields texts of a cache unchanged: truncated ones would have no targets in it."""
        if self._prompts:
            raise StillhouseError(
                Reason.DATASET_INVALID,
                f"{path} is a cache, whose rows have token ids and no fields for teachers[].prompt. Leave the prompt out: a "
                "cache keeps those that its teachers saw; or name the rows that it was built from.",
            )
        found = cached_examples(path, self._encoder.fingerprint, routed=bool(self._data.teacher_field))
        for example in itertools.islice(found, limit):
            if len(example.token_ids) > self._data.max_sequence_tokens:
                self.left_out["too_long"] += 1
            else:
                self._encoder.see_end(example.token_ids.tolist())
                yield example

    def _teacher(self, row: DatasetRow) -> str:
        """Returns the row's teacher, from `data.teacher_field`. Raises StillhouseError(DATASET_INVALID)."""
        field = self._data.teacher_field
        if not field:
            return ""
        name = row.text(field)
        if name not in self._teachers:
            raise row.invalid(
                field, f'is "{name}", which no teacher is called; there are {", ".join(self._teachers)}.'
            )
        return name


_LeftOut = Literal["weight_0", "too_long", "first_target_beyond_limit", "nothing_to_learn"]
_CAUSES: Mapping[_LeftOut, str] = {
    "weight_0": "have weight 0 on every turn of the assistant: leave weight out of a turn to learn",
    "too_long": "have more than {limit} tokens: raise data.max_sequence_tokens, or set data.overflow: truncate",
    "first_target_beyond_limit": "have no target within {limit} tokens: raise data.max_sequence_tokens",
    "nothing_to_learn": "have no text to learn: give rows with completions",
}
"""Clauses about rows that are left out, each with its remedy."""


def _why_left_out(row: DatasetRow, mask: Sequence[bool]) -> _LeftOut:
    """Returns the cause for which a row has no target within the limit."""
    if any(mask):
        return "first_target_beyond_limit"
    lists = [value for value in row.values.values() if isinstance(value, list)]
    turns = [each for messages in lists for each in messages if isinstance(each, dict)]
    return "weight_0" if any(each.get("weight") == 0 for each in turns) else "nothing_to_learn"


def _nothing_left(left_out: Counter[_LeftOut], limit: int) -> str:
    """Returns the sentence about training data of which every row is left out."""
    total = left_out.total()
    if not total:
        return "data.train has no rows. Give files with rows, or raise their limit."
    causes = "; ".join(
        f"{count} {_CAUSES[cause].format(limit=limit)}" for cause, count in left_out.most_common()
    )
    return f"data.train has nothing to train on: of its {total} rows {causes}."


def _held_out_rows(num_rows: int, data: DataConfig) -> set[int]:
    """Samples the indices of held-out rows, from `data.seed` alone."""
    if data.eval_fraction == 0 or num_rows < 2:
        return set()
    count = min(MAX_SPLIT_ROWS, max(1, round(data.eval_fraction * num_rows)), num_rows - 1)
    generator = np.random.Generator(np.random.PCG64([data.seed, _SPLIT_STREAM]))
    return set(generator.permutation(num_rows)[:count].tolist())
