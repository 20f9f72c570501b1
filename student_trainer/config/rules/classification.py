"""Checks a run that trains a classifier: what belongs to language models alone is refused by name."""

from __future__ import annotations

from collections.abc import Iterator

from stillhouse.protos.errors import FieldViolation
from stillhouse.student_trainer.config.fields import fields_of
from stillhouse.student_trainer.config.schema import (
    CLASSIFICATION,
    DataConfig,
    EvaluationConfig,
    LossConfig,
    LossTermConfig,
    RunConfig,
)

METRICS = ("accuracy", "f1", "ece", "cross_entropy", "kl", "agreement")
_OF_CLASSES_ALONE = ("f1",)
_LOSS = (
    *("top_k", "sparse_target", "num_samples", "temperature_mode", "reduction"),
    *("foreign_tokenizer", "chunk_temperature", "chunks"),
)
"""Fields of a loss that are about tokens of text."""
_TERM = ("estimator", "token_weighting", "baseline")
_DATA = ("completion_only", "chat", "end_text", "chat_template", "chat_template_kwargs", "tools")


def check_classification(config: RunConfig) -> Iterator[FieldViolation]:
    """Problems of `task: sequence_classification`, and of settings that need it."""
    if not config.classifies:
        yield from _check_others(config)
        return
    loss = config.contexts[0].loss if len(config.contexts) == 1 else None
    for path, each in (("loss", config.loss), *((("contexts[0].loss", loss),) if loss else ())):
        yield from _check_fields(path, each, LossConfig, _LOSS)
        for i, term in enumerate(each.terms):
            yield from _check_fields(f"{path}.terms[{i}]", term, LossTermConfig, _TERM)
    yield from _check_fields("data", config.data, DataConfig, _DATA)
    if config.data.packing:
        yield _of_text("data.packing", "true")
    if len(config.contexts) != 1 or config.contexts[0].dataset is None:
        yield FieldViolation(
            "contexts",
            f"are for language models: with task: {CLASSIFICATION} the rows of the dataset are all that is trained on. Leave "
            "it out.",
        )
    for number, teacher in enumerate(config.teachers):
        if teacher.prompt is not None:
            yield _of_text(f"teachers[{number}].prompt", "set")
    if config.student.quantization != "none":
        yield _of_text("student.quantization", f'"{config.student.quantization}"')
    yield from _check_evaluation(config)
    yield from _check_names(config)


def _check_evaluation(config: RunConfig) -> Iterator[FieldViolation]:
    for name in config.evaluation.metrics:
        if name not in METRICS:
            yield FieldViolation(
                "evaluation.metrics",
                f'has "{name}", which is one of language models; with task: {CLASSIFICATION} use {", ".join(METRICS)}.',
            )
    for number, each in enumerate(config.evaluation.sets):
        for name in ("metrics", "match"):
            if getattr(each, name):
                yield FieldViolation(
                    f"evaluation.sets[{number}].{name}",
                    f"is for language models; with task: {CLASSIFICATION} a set has all metrics of classes. Leave it out.",
                )
    for name in ("generation", "baseline"):
        if getattr(config.evaluation, name):
            yield FieldViolation(
                f"evaluation.{name}",
                f"is for language models; with task: {CLASSIFICATION} leave it out, and name rows in data.eval.",
            )
    yield from _check_fields("evaluation", config.evaluation, EvaluationConfig, ("match",))


def _check_names(config: RunConfig) -> Iterator[FieldViolation]:
    names = config.data.classes
    if len(names) == 1:
        yield FieldViolation("data.classes", "names one class; a classifier tells two or more apart.")
    if len(set(names)) < len(names):
        yield FieldViolation("data.classes", "names a class twice; name each once.")


def _check_others(config: RunConfig) -> Iterator[FieldViolation]:
    if config.data.classes:
        yield FieldViolation(
            "data.classes", f"are of a classifier, and task is {config.task}; set task: {CLASSIFICATION}."
        )
    for name in config.evaluation.metrics:
        if name in _OF_CLASSES_ALONE:
            yield FieldViolation(
                "evaluation.metrics",
                f'has "{name}", which counts classes, and task is {config.task}; leave it out.',
            )


def _check_fields(
    path: str, config: object, cls: type[object], names: tuple[str, ...]
) -> Iterator[FieldViolation]:
    """Refuses fields with another value than their default."""
    for name in names:
        value = getattr(config, name)
        if value != fields_of(cls)[name].default:
            yield _of_text(f"{path}.{name}", f'"{value}"' if isinstance(value, str) else str(value).lower())


def _of_text(path: str, value: str) -> FieldViolation:
    return FieldViolation(
        path, f"is {value}, which is a setting of language models; with task: {CLASSIFICATION} leave it out."
    )
