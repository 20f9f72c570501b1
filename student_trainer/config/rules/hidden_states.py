"""Checks the comparison of hidden states: what it cannot go with."""

from __future__ import annotations

from collections.abc import Iterator

from stillhouse.protos.errors import FieldViolation
from stillhouse.student_trainer.config.rules.contexts import is_ensemble
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.config.settled.layer_pairs import check_pairs


def check_hidden_states(config: RunConfig) -> Iterator[FieldViolation]:
    """Problems of `hidden_mse`, of the run's loss and of those of contexts."""
    for number, context in enumerate(config.contexts):
        hidden = config.loss_of(context).hidden_mse
        if hidden is None or not config.loss_of(context).compares_hidden:
            continue
        path = f"contexts[{number}].loss.hidden_mse" if context.loss else "loss.hidden_mse"
        yield from check_pairs(path, hidden)
        why = _why_not(config) or (
            ""
            if context.dataset
            else "compares rows of a dataset, not generated text: leave it out of this context's loss"
        )
        if why:
            yield FieldViolation(path, f"{why}.")


def _why_not(config: RunConfig) -> str:
    if config.cache is not None or config.builds_cache:
        return "needs hidden states, which no cache stores for their size: leave out the cache, or hidden_mse"
    if is_ensemble(config):
        return "compares with one teacher, and several are mixed: name one, or leave it out"
    if any(config.loss_of(each).foreign_tokenizer == "alm" for each in config.contexts):
        return "compares token by token, and foreign_tokenizer: alm has other tokens for the teacher: leave it out"
    return ""
