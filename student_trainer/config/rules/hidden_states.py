"""Checks the comparison of hidden states: what it cannot go with."""

from __future__ import annotations

from collections.abc import Iterator

from stillhouse.protos.errors import FieldViolation
from stillhouse.student_trainer.config.rules.contexts import is_ensemble
from stillhouse.student_trainer.config.schema import RunConfig


def check_hidden_states(config: RunConfig) -> Iterator[FieldViolation]:
    """Problems of `hidden_mse`, of the run's loss and of those of contexts."""
    for number, context in enumerate(config.contexts):
        if not config.loss_of(context).compares_hidden:
            continue
        path = f"contexts[{number}].loss.hidden_mse" if context.loss else "loss.hidden_mse"
        why = _why_not(config) or (
            "" if context.dataset else "compares rows of a dataset, not generated text"
        )
        if why:
            yield FieldViolation(path, f"{why}. Leave it out.")


def _why_not(config: RunConfig) -> str:
    if config.classifies:
        return "is for language models, and the student is a classifier"
    if config.cache is not None or config.task == "cache":
        return "needs hidden states, which no cache stores"
    if is_ensemble(config):
        return "compares with one teacher, and several are mixed"
    if any(config.loss_of(each).foreign_tokenizer == "alm" for each in config.contexts):
        return "compares token by token, and foreign_tokenizer: alm has other tokens for the teacher"
    return ""
