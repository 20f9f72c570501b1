"""Reads the named sets of an evaluation: rows like those of training, or rows with choices, one sequence for each choice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.field_error import kind_of
from stillhouse.student_trainer.config.evaluation_set import EvaluationSetConfig
from stillhouse.student_trainer.config.rules.evaluation import SetSettings, settled_sets
from stillhouse.student_trainer.config.schema import DatasetConfig, RunConfig
from stillhouse.student_trainer.train.data.corpus import Corpus, load_corpus
from stillhouse.student_trainer.train.data.encoding import Example, RowEncoder, num_prompt_tokens
from stillhouse.student_trainer.train.data.readers import DatasetRow, read_rows

log = structlog.get_logger()

MIN_CHOICES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One question: its sequences, and the right one among them."""

    begin: int
    """Place of its first sequence in the set."""
    end: int
    right: int
    """Place of the right one in the set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationRows:
    """The place of one set among the held-out rows of a run."""

    settings: SetSettings
    begin: int
    end: int
    choices: Sequence[Choice] = ()
    """Questions, where choices are compared."""


def with_sets(
    config: RunConfig, corpus: Corpus, tokenizer: Any, data_dir: Path
) -> tuple[Corpus, Sequence[EvaluationRows]]:
    """Returns `corpus` with the rows of all sets behind its held-out rows, and their places.

    Raises StillhouseError, as `load_corpus` does, and DATASET_INVALID for rows without choices where these are compared.
    """
    held_out, *named = settled_sets(config)
    rows, sets = corpus.eval, [EvaluationRows(settings=held_out, begin=0, end=len(corpus.eval))]
    for settings, each in zip(named, config.evaluation.sets, strict=True):
        choices: Sequence[Choice] = ()
        if settings.has_choices:
            read, choices = _read_choices(config, each, tokenizer, data_dir)
            examples: Sequence[Example] = read
        else:
            examples = _read_set(config, each, tokenizer, data_dir)
        if not examples:
            raise StillhouseError(
                Reason.DATASET_INVALID,
                f"{each.path} has no row with a target within {config.data.max_sequence_tokens} tokens, which "
                f"{settings.field} needs. Raise data.max_sequence_tokens, or give rows with completions.",
            )
        begin = len(rows)
        rows = [*rows, *examples]
        sets.append(EvaluationRows(settings=settings, begin=begin, end=len(rows), choices=choices))
        log.info("evaluation set read", set=settings.name, rows=len(choices) or len(examples))
    return (replace(corpus, eval=rows) if named else corpus), sets


def _read_set(
    config: RunConfig, evaluated: EvaluationSetConfig, tokenizer: Any, data_dir: Path
) -> Sequence[Example]:
    dataset = DatasetConfig(path=evaluated.path, limit=evaluated.limit)
    data = replace(config.data, train=(), eval=(dataset,))
    names = [teacher.name for teacher in config.teachers]
    evaluation = replace(config.evaluation, limit=None)
    return load_corpus(data, evaluation, tokenizer, data_dir, names, prompted=config.teachers).eval


def _read_choices(
    config: RunConfig, evaluated: EvaluationSetConfig, tokenizer: Any, data_dir: Path
) -> tuple[list[Example], list[Choice]]:
    data = config.data
    encoder = RowEncoder.of(replace(data, completion_only=True), tokenizer)
    examples: list[Example] = []
    choices = []
    dataset = DatasetConfig(path=evaluated.path, limit=evaluated.limit)
    for row in read_rows(dataset, data_dir):
        begin = len(examples)
        texts = _texts(row)
        right = _right(row, texts)
        examples += [_example(row, text, encoder, data.max_sequence_tokens) for text in texts]
        choices.append(Choice(begin=begin, end=len(examples), right=begin + right))
    return examples, choices


def _texts(row: DatasetRow) -> list[str]:
    texts = row.values.get("choices")
    if not isinstance(texts, list) or not all(isinstance(each, str) and each for each in texts):
        raise row.invalid("choices", f"is {kind_of(texts)}; it must be a list of texts that are not empty.")
    if len(texts) < MIN_CHOICES:
        raise row.invalid("choices", f"has {len(texts)} entries; give {MIN_CHOICES} or more.")
    return texts


def _right(row: DatasetRow, texts: Sequence[str]) -> int:
    """Returns the place of the right choice: `answer` is its number from 0, or its text."""
    answer = row.values.get("answer")
    if isinstance(answer, str) and texts.count(answer) == 1:
        return texts.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        return answer
    raise row.invalid(
        "answer",
        f"is {kind_of(answer)} that names none of the {len(texts)} choices; give its number from 0, or its text.",
    )


def _example(row: DatasetRow, text: str, encoder: RowEncoder, limit: int) -> Example:
    """Returns the row with one choice as its completion, without an end: the likelihood of the text alone counts."""
    values = {
        name: value for name, value in row.values.items() if name not in ("choices", "answer", "completion")
    }
    values["finish_reason"] = "length"
    if "messages" in values:
        turn = {"role": "assistant", "content": text}
        values["messages"] = [*_turns(row, values["messages"]), turn]
    else:
        values["completion"] = text
    token_ids, mask = encoder.encode(replace(row, values=values))
    if len(token_ids) > limit or not any(mask):
        raise row.invalid(
            "choices",
            f"has an entry whose row has {len(token_ids)} tokens; at most {limit} are kept. Raise data.max_sequence_tokens.",
        )
    return Example(
        token_ids=np.asarray(token_ids, np.int32),
        mask=np.asarray(mask, np.bool_),
        place=f"{row.path}, row {row.number}",
        num_prompt=num_prompt_tokens(mask),
    )


def _turns(row: DatasetRow, turns: Any) -> Iterator[Any]:
    if not isinstance(turns, list):
        raise row.invalid("messages", f"is {kind_of(turns)}; it must be a list of turns.")
    return iter(turns)
