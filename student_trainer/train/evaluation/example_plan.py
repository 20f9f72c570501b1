"""Chooses the rows of an evaluation whose tokens are written: the first ones of each set in turn, within a budget of tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.data.evaluation_sets import EvaluationRows

MAX_ROW_TOKENS = 256
"""Tokens of a row that are written; longer rows are cut."""
MAX_BEFORE = 64
"""Tokens before the first target that are written."""
MAX_TOKENS = 2048
"""Tokens of all rows of an evaluation that are written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownRow:
    """A part of a held-out row, tokens [begin, end)."""

    example: Example
    set_name: str
    """Empty for the held-out rows."""
    number: int
    """Place of the row in its set, from 0."""
    begin: int
    end: int
    num_targets: int
    """Targets in the part: the first ones of the row."""

    @property
    def targets(self) -> NDArray[np.int64]:
        """Positions of the targets in the row."""
        return np.flatnonzero(self.example.mask)[: self.num_targets]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExamplePlan:
    """The rows whose tokens are written, by their places among all held-out rows."""

    rows: Mapping[int, ShownRow] = field(default_factory=dict)
    left_out: int = 0
    """Rows that were wanted beyond the budget."""


def choose_rows(examples: Sequence[Example], sets: Sequence[EvaluationRows], number: int) -> ExamplePlan:
    """Returns the plan for `number` rows of each set of `examples`; sets that compare choices have none."""
    kept = [each for each in sets if not each.settings.has_choices]
    places = [
        (each, each.begin + row)
        for row in range(number)
        for each in kept
        if each.begin + row < min(each.end, len(examples))
    ]
    rows: dict[int, ShownRow] = {}
    room = MAX_TOKENS
    for each, place in places:
        example = examples[place]
        begin = max(0, example.start - MAX_BEFORE)
        end = min(len(example.token_ids), begin + min(MAX_ROW_TOKENS, room))
        num_targets = int(example.mask[:end].sum())
        if not num_targets:
            break
        room -= end - begin
        rows[place] = ShownRow(
            example=example,
            set_name=each.settings.name,
            number=place - each.begin,
            begin=begin,
            end=end,
            num_targets=num_targets,
        )
    return ExamplePlan(rows=rows, left_out=len(places) - len(rows))
