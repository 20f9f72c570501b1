"""Checks of a cross-tokenizer run, which compares chunks of text."""

from __future__ import annotations

from collections.abc import Iterator

from stillhouse.protos.errors import FieldViolation
from stillhouse.student_trainer.config.rules.contexts import is_ensemble, run_losses
from stillhouse.student_trainer.config.schema import LossConfig, RunConfig

OF_CHUNKS = (
    *("forward_kl", "reverse_kl", "jsd", "jsd_normalised", "tvd", "skew_kl", "skew_reverse_kl", "alpha_beta"),
)
"""Divergences of two probabilities: the f-divergences."""
_OF_TOKENS = ("kl", "agreement")
"""Metrics that compare distributions over tokens."""


def is_bridged(config: RunConfig) -> bool:
    """True if the run compares teacher and student by chunks of text."""
    return any(_chunk_losses(config))


def chunk_loss(config: RunConfig) -> LossConfig:
    """The loss by which held-out rows are compared in a cross-tokenizer run: the first of those that compare chunks."""
    return next(_chunk_losses(config))


def _chunk_losses(config: RunConfig) -> Iterator[LossConfig]:
    losses = (loss for _, loss in run_losses(config))
    return (loss for loss in losses if loss.asks_teacher and loss.foreign_tokenizer == "alm")


def evaluation_top_k(config: RunConfig) -> int:
    """Top-k to query on held-out rows: 0 where chunks are compared."""
    return 0 if is_bridged(config) else config.evaluation.top_k


def check_cross_tokenizer(config: RunConfig) -> Iterator[FieldViolation]:
    """Problems of a cross-tokenizer run, and of metrics that need one."""
    if not is_bridged(config):
        if "alm" in config.evaluation.metrics:
            yield FieldViolation(
                "evaluation.metrics",
                'has "alm", which compares chunks of text; use it with loss.foreign_tokenizer: alm.',
            )
        return
    for path, loss in run_losses(config):
        yield from _check_loss(path, loss)
    if len({loss.chunks for _, loss in run_losses(config) if loss.asks_teacher}) > 1:
        yield FieldViolation(
            "contexts", "have losses with different chunks, and the text is cut once. Give all the same."
        )
    for i, context in enumerate(config.contexts):
        if context.dataset is None:
            yield FieldViolation(
                f"contexts[{i}]",
                "is text that is generated during the run in one side's tokens; loss.foreign_tokenizer: alm trains on a dataset. "
                "Use dataset: {}, such as of completions from `stillhouse generate --in FILE --as dataset`.",
            )
    if is_ensemble(config):
        yield FieldViolation(
            "teachers",
            "are several that would be mixed, but with loss.foreign_tokenizer: alm each may cut the text differently. Keep "
            "one, or set data.teacher_field so that each row has its own.",
        )
    if config.builds_cache:
        yield FieldViolation(
            "task",
            'is "cache", which stores outputs for the student\'s tokens; with loss.foreign_tokenizer: alm use '
            "cache.mode: write_through in a run that trains.",
        )
    if config.is_offline:
        yield FieldViolation(
            "cache.mode",
            'is "only", but loss.foreign_tokenizer: alm needs the tokenizer of a running teacher. Use "read".',
        )
    for name in sorted(set(_OF_TOKENS) & set(config.evaluation.metrics)):
        yield FieldViolation(
            "evaluation.metrics",
            f'has "{name}", which compares distributions over one vocabulary; with loss.foreign_tokenizer: alm use "alm".',
        )


def _check_loss(path: str, loss: LossConfig) -> Iterator[FieldViolation]:
    if not loss.asks_teacher:
        return
    if loss.foreign_tokenizer != "alm":
        yield FieldViolation(
            f"{path}.foreign_tokenizer",
            'is "refuse" beside a loss with "alm": a term over one vocabulary and one over chunks do not go together. Set '
            "alm in all losses, or every term's weight here to 0, which leaves hard_weight.",
        )
        return
    if loss.temperature != 1:
        yield FieldViolation(
            f"{path}.temperature",
            f"is {loss.temperature:g}, which is that of a softmax; with foreign_tokenizer: alm set chunk_temperature.",
        )
    if loss.sparse_target != "tail_bucket":
        yield FieldViolation(
            f"{path}.sparse_target",
            f'is "{loss.sparse_target}", but with foreign_tokenizer: alm no tokens beside those of the text are queried. '
            "Leave it out.",
        )
    for i, term in enumerate(loss.terms):
        if term.weight == 0:
            continue
        if term.divergence not in OF_CHUNKS:
            yield FieldViolation(
                f"{path}.terms[{i}].divergence",
                f'"{term.divergence}" compares many tokens, and with foreign_tokenizer: alm there are two probabilities. Use '
                f"one of {', '.join(OF_CHUNKS)}.",
            )
        if term.token_weighting != "uniform":  # noqa: S105 (tokens of text)
            yield FieldViolation(
                f"{path}.terms[{i}].token_weighting",
                f'"{term.token_weighting}" needs distributions over tokens, which foreign_tokenizer: alm does not query. '
                "Leave it out.",
            )
