"""Scores of rows as sums that add up: the value of any rows, such as those of a bootstrap's sample, is a function of their sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.evaluation.answers import is_comparable, matching, matching_fields
from stillhouse.protos.evaluation.calibration import ece_of_sums
from stillhouse.protos.evaluation.f1 import f1_of_sums
from stillhouse.protos.evaluation.names import values_of
from stillhouse.protos.evaluation.text_overlap import (
    rouge_scores,
    rouge_signature,
    sacrebleu_of_sums,
    sacrebleu_signature,
    sacrebleu_sums,
)


def _mean(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    total, count = sums[..., 0], sums[..., 1]
    return np.asarray(np.divide(total, count, out=np.full(np.shape(count), np.nan), where=count > 0))


def _exponential(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    # Beyond this exponent no float holds the perplexity.
    return np.asarray(np.exp(np.minimum(_mean(sums), 700.0)))


REDUCTIONS: Mapping[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "mean": _mean,
    "exponential": _exponential,
    "ece": ece_of_sums,
    "macro_f1": f1_of_sums,
    "bleu": partial(sacrebleu_of_sums, "bleu"),
    "chrf": partial(sacrebleu_of_sums, "chrf"),
}
"""Values of sums [..., S], by name: a mean has a sum and a count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSums:
    """One metric of some rows."""

    sums: NDArray[np.float64]
    """[N, S]."""
    reduction: str = "mean"
    """Name in REDUCTIONS."""
    signature: str = ""
    """Settings of the library that counted, for reproduction."""

    @classmethod
    def mean(
        cls, totals: NDArray[np.float64], counts: NDArray[np.float64] | None = None, signature: str = ""
    ) -> RowSums:
        """The sum of `totals` over that of `counts`, both [N]; 1 for each row without `counts`."""
        weights = np.ones(len(totals)) if counts is None else counts
        return cls(sums=np.stack([totals, weights], axis=1).astype(np.float64), signature=signature)

    @property
    def value(self) -> float:
        """The metric of all rows; NaN without any."""
        return float(self.values(self.sums.sum(0)))

    def values(self, sums: NDArray[np.float64]) -> NDArray[np.float64]:
        """The metric of each sum, [..., S] to [...]."""
        return np.asarray(REDUCTIONS[self.reduction](sums), np.float64)


def score_texts(
    metric: str,
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    match: str = "exact",
    places: Sequence[str] = (),
) -> dict[str, RowSums]:
    """Returns the values of a text metric by name, each over all rows; accuracy by `match`, and with "fields" of each field.

    `places` name the references for errors, such as "rows.jsonl, row 3"; without any they are numbered.
    Raises StillhouseError: DATASET_INVALID for an empty reference, or where no reference has what `match` compares;
    INVALID_CONFIG if a library is missing.
    """
    if metric in ("bleu", "chrf"):
        sums = sacrebleu_sums(metric, hypotheses, references, places=places)
        return {metric: RowSums(sums=sums, reduction=metric, signature=sacrebleu_signature(metric))}
    if metric == "rouge":
        scores = rouge_scores(hypotheses, references).values()
        signature = rouge_signature()
        return {
            name: RowSums.mean(each, signature=signature)
            for name, each in zip(values_of(metric), scores, strict=True)
        }
    if references and not any(map(is_comparable(match), references)):
        what = "a number" if match == "numeric" else "a JSON object with fields"
        raise StillhouseError(
            Reason.DATASET_INVALID,
            f"No reference has {what}, which the match {match} compares; the first is that of {places[0].rstrip(',') if places else 'row 1'}. "
            "Correct them, or choose another match.",
        )
    if match == "fields":
        return _field_accuracy(hypotheses, references)
    return {"accuracy": RowSums.mean(matching(match, hypotheses, references), signature=f"match:{match}")}


def _field_accuracy(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, RowSums]:
    """Returns the share of right fields, and of each one by its name."""
    fields = matching_fields(hypotheses, references)
    none = np.zeros(len(references))
    hits = sum((each for each, _ in fields.values()), none)
    counts = sum((each for _, each in fields.values()), none)
    found = {"accuracy": RowSums.mean(hits, counts, "match:fields")}
    return found | {
        f"accuracy/{name}": RowSums.mean(*each, signature="match:fields") for name, each in fields.items()
    }
