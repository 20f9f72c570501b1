"""Scores of one set from the sums over the tokens of each row: means over tokens, calibration, and questions with choices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.evaluation.calibration import bin_sums
from stillhouse.protos.evaluation.row_sums import RowSums
from stillhouse.student_trainer.train.batching.collate import ScoredExample
from stillhouse.student_trainer.train.data.evaluation_sets import EvaluationRows

Columns: TypeAlias = dict[str, NDArray[np.float64]]
"""Sums over the tokens of each row, [N, S], by name; those of the teacher itself after TEACHER."""

TEACHER = "teacher:"
"""Begins the names of the teacher's own columns."""
_MEANS = ("cross_entropy", "kl", "agreement", "acceptance", "overlap")


def set_scores(rows: EvaluationRows, columns: Columns, of: str = "") -> dict[str, RowSums]:
    """Returns the scores of a set by name; `of` TEACHER gives those of the teacher."""
    own = {
        name.removeprefix(of): each[rows.begin : rows.end]
        for name, each in columns.items()
        if name.startswith(TEACHER) == bool(of) and name.startswith(of)
    }
    if rows.begin == rows.end or "cross_entropy" not in own:
        return {}
    if rows.settings.has_choices:
        return _choice_scores(rows, own["cross_entropy"][:, 0])
    tokens = columns["tokens"][rows.begin : rows.end, 0]
    scores = {name: RowSums.mean(own[name][:, 0], tokens) for name in _MEANS if name in own}
    scores["perplexity"] = RowSums(sums=scores["cross_entropy"].sums, reduction="exponential")
    if "ece" in own:
        scores["ece"] = RowSums(sums=own["ece"], reduction="ece")
    return scores


def _choice_scores(rows: EvaluationRows, cross_entropy: NDArray[np.float64]) -> dict[str, RowSums]:
    """Returns the share of questions whose right choice is the likeliest, and the calibration over the choices."""
    correct, confidence = [], []
    for each in rows.choices:
        logprobs = -cross_entropy[each.begin : each.end]
        probs = np.exp(logprobs - logprobs.max())
        correct.append(bool(each.begin + int(logprobs.argmax()) == each.right))
        confidence.append(float(probs.max() / probs.sum()))
    bins = [
        bin_sums(np.asarray([sure]), np.asarray([right]))
        for sure, right in zip(confidence, correct, strict=True)
    ]
    return {
        "accuracy": RowSums.mean(np.asarray(correct, np.float64), signature="match:choices"),
        "ece": RowSums(sums=np.stack(bins), reduction="ece"),
    }


def gather_columns(
    own: Columns,
    places: Sequence[int],
    *,
    num_rows: int,
    exchange: Callable[[Any], list[Any]],
    sums: Mapping[str, float] | None = None,
) -> tuple[Columns, Counter[str]]:
    """Returns the columns of all `num_rows` rows and the totals of `sums`, bit for bit the same in all processes.

    `own` are those of the rows at `places`; `exchange` returns the values of all processes.
    """
    value = {
        "places": list(places),
        "columns": {name: each.tolist() for name, each in own.items()},
        "sums": {name: float(each) for name, each in (sums or {}).items()},
    }
    columns: Columns = {}
    total: Counter[str] = Counter()
    for told in exchange(value):
        total.update(told["sums"])
        for name, values in told["columns"].items():
            part = np.asarray(values, np.float64)
            if len(part):
                whole = columns.setdefault(name, np.zeros((num_rows, part.shape[1])))
                whole[told["places"]] = part
    return columns, total


def teacher_columns(rows: Sequence[ScoredExample]) -> Columns:
    """Returns the teacher's own sums over the tokens of each row, where all rows have its distributions in the same tokens."""
    if not rows or any(each.answer is None or each.example.aligned is not None for each in rows):
        return {}
    losses, bins = [], []
    for each in rows:
        answer, example = each.answer, each.example
        assert answer is not None
        at = np.flatnonzero(example.mask)
        kept = at - answer.start
        losses.append(-float(answer.target_logprobs[kept].astype(np.float64).sum()))
        if answer.token_ids.shape[1]:
            right = answer.token_ids[kept, 0] == example.token_ids[at]
            bins.append(bin_sums(np.exp(answer.logprobs[kept, 0].astype(np.float64)), right))
    columns = {f"{TEACHER}cross_entropy": np.asarray(losses)[:, None]}
    return columns | ({f"{TEACHER}ece": np.stack(bins)} if len(bins) == len(rows) else {})
