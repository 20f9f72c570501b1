"""The run's text as token ids: encoded once, truncated, split deterministically, and read when it is needed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import MAX_SPLIT_ROWS, DataConfig, EvaluationConfig
from stillhouse.student_trainer.config.teacher import TeacherConfig
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.data.prepared.left_out import nothing_left
from stillhouse.student_trainer.train.data.prepared.preparation import Prepared, Preparer
from stillhouse.student_trainer.train.data.prepared.rows import ExampleRows
from stillhouse.student_trainer.train.data.prepared.settings import ExampleSettings
from stillhouse.student_trainer.train.data.schedule import permutation

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
    digests: Sequence[str] = ()
    """Digests of the examples of each dataset, those to train on first."""
    template_date: str = ""
    """Day that the chat template wrote into the text, such as 2025-01-31; empty if it wrote none."""

    @property
    def longest(self) -> Example:
        """The example with the most tokens, the first of several."""
        best = [each for each in (longest_of(self.train), longest_of(self.eval)) if each is not None]
        return max(best, key=lambda example: len(example.token_ids))

    @property
    def largest(self) -> Example:
        """The example with the largest token id, the first of several."""
        best = [each for each in (_largest_of(self.train), _largest_of(self.eval)) if each is not None]
        return max(best, key=lambda example: int(example.token_ids.max()))


def longest_of(examples: Sequence[Example]) -> Example | None:
    """Returns the example with the most tokens, the first of several; None if there is none."""
    if isinstance(examples, ExampleRows):
        return examples[examples.longest()[0]] if examples else None
    return max(examples, key=lambda example: len(example.token_ids), default=None)


def _largest_of(examples: Sequence[Example]) -> Example | None:
    if isinstance(examples, ExampleRows):
        return examples[examples.largest()[0]] if examples else None
    return max(examples, key=lambda example: int(example.token_ids.max()), default=None)


def load_corpus(
    data: DataConfig,
    evaluation: EvaluationConfig,
    tokenizer: Any,
    data_dir: Path,
    teachers: Sequence[str] = (),
    *,
    prompted: Sequence[TeacherConfig] = (),
) -> Corpus:
    """Encodes the examples of `data` with the student's tokenizer, in memory; `teachers` are the names that rows may give.

    The prompts that those of `prompted` see alone are encoded beside them.

    Raises:
        StillhouseError: DATASET_NOT_FOUND or DATASET_INVALID, also if no row is left to train on.
    """
    settings = ExampleSettings(data=data, teachers=tuple(teachers), prompted=tuple(prompted))
    with Preparer(settings, tokenizer, data_dir) as preparer:
        return assemble(data, evaluation, [preparer.prepare(each) for each in (*data.train, *data.eval)])


def assemble(data: DataConfig, evaluation: EvaluationConfig, prepared: Sequence[Prepared]) -> Corpus:
    """Splits the datasets of `data`, those to train on first. Raises StillhouseError(DATASET_INVALID) if no row of either is left."""
    parts = [each.table for each in prepared[: len(data.train)]]
    total = sum(map(len, parts))
    if data.eval:
        chosen = np.zeros(0, np.int64)
        held_out = ExampleRows([each.table for each in prepared[len(data.train) :]])
    else:
        chosen = _held_out_rows(total, data)
        held_out = ExampleRows(parts, picked=chosen)
    train = ExampleRows(parts, without=chosen)
    if not train and data.train:
        raise _nothing_left(data, prepared[: len(data.train)], "data.train")
    if not held_out and data.eval and data.train:
        raise _nothing_left(data, prepared[len(data.train) :], "data.eval")
    log.info("data read", train_rows=len(train), eval_rows=len(held_out))
    ends = np.cumsum([0, *map(len, parts)])
    sizes = np.diff(ends) - np.diff(np.searchsorted(chosen, ends))
    told = [each.told for each in prepared]
    return Corpus(
        train=train,
        eval=held_out[: evaluation.limit],
        dataset_sizes=sizes.tolist(),
        end_ids=tuple(sorted({end for each in told for end in each.end_ids})),
        digests=tuple(each.digest for each in prepared),
        template_date=data.date if any(each.wrote_date for each in told) else "",
    )


def _nothing_left(data: DataConfig, prepared: Sequence[Prepared], of: str) -> StillhouseError:
    left_out = Counter[str]()
    for each in prepared:
        left_out.update(each.told.left_out)
    return StillhouseError(Reason.DATASET_INVALID, nothing_left(left_out, data.max_sequence_tokens, of))


def _held_out_rows(num_rows: int, data: DataConfig) -> NDArray[np.int64]:
    """Samples the indices of held-out rows, ascending, from `data.seed` alone."""
    if data.eval_fraction == 0 or num_rows < 2:
        return np.zeros(0, np.int64)
    count = min(MAX_SPLIT_ROWS, max(1, round(data.eval_fraction * num_rows)), num_rows - 1)
    return np.sort(permutation(num_rows, [data.seed, _SPLIT_STREAM])[:count]).astype(np.int64)
