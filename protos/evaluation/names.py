"""Names of the metrics of an evaluation, what each needs, and which direction is better."""

from __future__ import annotations

TEXT_METRICS = ("bleu", "chrf", "rouge", "accuracy")
"""Metrics of text that a model writes, beside a reference; with choices, accuracy needs no text of its own."""
TEACHER_METRICS = ("kl", "agreement", "alm", "acceptance", "overlap")
"""Metrics that need a teacher's outputs."""
TOKEN_METRICS = ("perplexity", "cross_entropy", "ece")
"""Metrics of the model's distributions over the tokens of given text alone."""
METRICS = (
    "kl",
    "perplexity",
    "agreement",
    "cross_entropy",
    "alm",
    "acceptance",
    "overlap",
    "ece",
    *TEXT_METRICS,
)
"""All of them, as run files name them."""
CHOICE_METRICS = ("accuracy", "ece")
"""Metrics of rows with choices: both are over the choices, not over tokens."""
MATCHES = ("exact", "numeric", "fields", "choices")
"""Ways to compare an answer with its reference; choices compares likelihoods, without an answer."""
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
"""Values that the metric rouge stands for, by rouge-score's names."""
LOWER_IS_BETTER = frozenset({"kl", "perplexity", "cross_entropy", "alm", "ece"})
"""Metrics of which a lower value is better; of all others it is the higher one."""


def values_of(metric: str) -> tuple[str, ...]:
    """Returns the names of the values that a metric gives: three for rouge, its own name for all others."""
    return ("rouge_1", "rouge_2", "rouge_l") if metric == "rouge" else (metric,)


def is_better(metric: str, value: float, than: float) -> bool:
    """Returns True if `value` is better; NaN never is."""
    name = metric.rpartition("/")[2]
    return value < than if name in LOWER_IS_BETTER else value > than
