"""Rows that are left out: their causes, and the sentence about data of which nothing is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stillhouse.student_trainer.train.data.readers import DatasetRow

LeftOut = Literal[
    "weight_0",
    "too_long",
    "too_long_for_teacher",
    "first_target_beyond_limit",
    "first_target_beyond_teacher_limit",
    "nothing_to_learn",
]
_CAUSES: Mapping[str, str] = {
    "weight_0": "have weight 0 on every turn of the assistant: leave weight out of a turn to learn",
    "too_long": "have more than {limit} tokens: raise data.max_sequence_tokens, or set data.overflow: truncate",
    "too_long_for_teacher": "have more tokens than teachers[].prompt.max_sequence_tokens behind a teacher's prompt: raise it, "
    "shorten the prompt, or set data.overflow: truncate",
    "first_target_beyond_limit": "have no target within {limit} tokens: raise data.max_sequence_tokens",
    "first_target_beyond_teacher_limit": "have no target within teachers[].prompt.max_sequence_tokens behind a teacher's "
    "prompt: raise it, or shorten the prompt",
    "nothing_to_learn": "have no text to learn: give rows with completions",
}
"""Clauses about rows that are left out, each with its remedy."""


def why_too_long(num_tokens: int, limit: int) -> LeftOut:
    """Returns the cause for which a row of `num_tokens` is left out; `limit` is data.max_sequence_tokens."""
    return "too_long" if num_tokens > limit else "too_long_for_teacher"


def why_left_out(row: DatasetRow, mask: NDArray[np.bool_], limit: int) -> LeftOut:
    """Returns the cause for which a row with the target `mask` has no target to learn; `limit` is data.max_sequence_tokens."""
    if mask[:limit].any():
        return "first_target_beyond_teacher_limit"
    if mask.any():
        return "first_target_beyond_limit"
    lists = [value for value in row.values.values() if isinstance(value, list)]
    turns = [each for messages in lists for each in messages if isinstance(each, dict)]
    return "weight_0" if any(each.get("weight") == 0 for each in turns) else "nothing_to_learn"


def nothing_left(left_out: Counter[str], limit: int, of: str = "data.train") -> str:
    """Returns the sentence about data of which every row is left out."""
    total = left_out.total()
    if not total:
        return f"{of} has no rows. Give files with rows, or raise their limit."
    causes = "; ".join(
        f"{count} {_CAUSES[cause].format(limit=limit)}" for cause, count in left_out.most_common()
    )
    what = "train" if of == "data.train" else "evaluate"
    return f"{of} has nothing to {what} on: of its {total} rows {causes}."
