"""BLEU and chrF by sacrebleu and ROUGE by rouge-score, as sums of rows that add up to the value of any rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.evaluation.names import ROUGE_TYPES


def sacrebleu_sums(
    metric: str, hypotheses: Sequence[str], references: Sequence[str], *, places: Sequence[str] = ()
) -> NDArray[np.float64]:
    """Returns sacrebleu's statistics of each row, [N, S], for "bleu" or "chrf" with its defaults.

    `places` name the references for errors. Raises StillhouseError(DATASET_INVALID) for an empty reference, which has no
    score.
    """
    for at, reference in enumerate(references):
        if not reference:
            place = places[at] if places else f"row {at + 1}"
            raise StillhouseError(
                Reason.DATASET_INVALID,
                f"The reference of {place} is empty, and {metric} compares with text. Give it one, or leave the row out.",
            )
    if not hypotheses:
        return np.zeros((0, _num_sums(metric)))
    stats = _scorer(metric)._extract_corpus_statistics(list(hypotheses), [list(references)])
    return np.asarray(stats, np.float64)


def sacrebleu_of_sums(metric: str, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the score, 0 to 100, of summed statistics, [..., S] to [...]."""
    flat = sums.reshape(-1, sums.shape[-1])
    scorer = _scorer(metric)
    scores = [scorer._compute_score_from_stats([int(each) for each in row]).score for row in flat]
    return np.asarray(scores, np.float64).reshape(sums.shape[:-1])


def sacrebleu_signature(metric: str) -> str:
    """Returns sacrebleu's signature of the settings, for one reference a row."""
    scorer = _scorer(metric)
    scorer.num_refs = 1
    return str(scorer.get_signature())


def rouge_scores(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Returns the F-measure of each row, [N], by type, without stemming, as rouge-score's command line computes it."""
    scorer = _rouge_scorer()
    rows = [
        scorer.score(reference, hypothesis)
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]
    return {
        kind: np.asarray([row[kind].fmeasure for row in rows], np.float64).reshape(len(rows))
        for kind in ROUGE_TYPES
    }


def rouge_signature() -> str:
    """Returns version and settings of rouge-score."""
    from importlib.metadata import version

    return f"rouge-score:{version('rouge-score')}|stemmer:no|F-measure:mean"


def _num_sums(metric: str) -> int:
    return 10 if metric == "bleu" else 18


@cache
def _scorer(metric: str) -> Any:
    try:
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise _missing(metric, "sacrebleu") from error
    # Texts that end in " ." are not tokenised ones, of which it would warn on standard error.
    return BLEU(force=True) if metric == "bleu" else CHRF()


@cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("rouge", "rouge-score") from error
    return RougeScorer(list(ROUGE_TYPES), use_stemmer=False)


def _missing(metric: str, library: str) -> StillhouseError:
    return StillhouseError(
        Reason.INVALID_CONFIG,
        f'The metric {metric} needs {library}, which is not installed here. Install it with `pip install "stillhouse[eval]"`.',
    )
