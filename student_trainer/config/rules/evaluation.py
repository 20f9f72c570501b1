"""Checks of an evaluation: its sets, its metrics, the best checkpoint, and a run whose task it is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stillhouse.protos.errors import FieldViolation
from stillhouse.protos.evaluation.names import (
    CHOICE_METRICS,
    TEACHER_METRICS,
    TEXT_METRICS,
    TOKEN_METRICS,
    values_of,
)
from stillhouse.student_trainer.config.rules.cross_tokenizer import is_bridged
from stillhouse.student_trainer.config.schema import CLASSIFICATION, RunConfig

_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, kw_only=True, slots=True)
class SetSettings:
    """The settled metrics of the held-out rows, whose name is empty, or of a named set."""

    name: str
    field: str
    """Its place in the run file."""
    metrics: Sequence[str]
    match: str

    @property
    def has_choices(self) -> bool:
        """True if likelihoods of choices are compared."""
        return self.match == "choices"

    @property
    def writes_text(self) -> bool:
        """True if the model writes text for it."""
        return not self.has_choices and bool(set(TEXT_METRICS) & set(self.metrics))

    @property
    def values(self) -> list[str]:
        """Names of its metrics, without eval/."""
        head = f"{self.name}/" if self.name else ""
        return [head + value for metric in self.metrics for value in values_of(metric)]


def settled_sets(config: RunConfig) -> list[SetSettings]:
    """The held-out rows, and every named set, with their metrics."""
    evaluation = config.evaluation
    held_out = SetSettings(name="", field="evaluation", metrics=evaluation.metrics, match=evaluation.match)
    named = []
    for number, each in enumerate(evaluation.sets):
        match = each.match or evaluation.match
        default = ("accuracy",) if match == "choices" else evaluation.metrics
        field = f"evaluation.sets[{number}]"
        named.append(SetSettings(name=each.name, field=field, metrics=each.metrics or default, match=match))
    return [held_out, *named]


def teacher_metrics(config: RunConfig) -> list[str]:
    """Metrics of any set that need a teacher's outputs, sorted."""
    named = {metric for each in settled_sets(config) for metric in each.metrics}
    needed = set(TEACHER_METRICS)
    if config.evaluation.teacher_alone:
        needed |= {*TOKEN_METRICS, *(CHOICE_METRICS if any(map(_has_choices, settled_sets(config))) else ())}
    return sorted(named & needed)


def _has_choices(settings: SetSettings) -> bool:
    return settings.has_choices


def check_evaluation(config: RunConfig) -> Iterator[FieldViolation]:
    """Problems of sets, metrics, generation and the best checkpoint."""
    evaluation = config.evaluation
    yield from _check_names(config)
    for each in settled_sets(config):
        yield from _check_metrics(each)
        if each.has_choices and any(teacher.prompt for teacher in config.teachers):
            yield FieldViolation(
                f"{each.field}.match",
                '"choices" compares texts behind the row\'s own prompt, which teachers[].prompt replaces. Leave one of them out.',
            )
    if evaluation.sets and is_bridged(config):
        yield FieldViolation(
            "evaluation.sets",
            "are evaluated in the student's tokens alone, which loss.foreign_tokenizer: alm does not compare. Leave them out, "
            "and evaluate the student afterwards with `stillhouse eval`.",
        )
    if evaluation.generation is not None and evaluation.generation.samples_per_prompt != 1:
        yield FieldViolation(
            "evaluation.generation.samples_per_prompt",
            f"is {evaluation.generation.samples_per_prompt}; a row is compared with one text. Leave it out.",
        )
    if evaluation.best_metric:
        yield from _check_best(config)
    if evaluation.examples and config.classifies:
        yield FieldViolation(
            "evaluation.examples",
            f"is {evaluation.examples}, and a classifier is compared by rows, not by tokens. Leave it out.",
        )
    if evaluation.baseline is not None and config.task != "evaluate":
        yield FieldViolation(
            "evaluation.baseline",
            "is for task: evaluate; a run that trains compares with its student at step 0. Leave it out.",
        )
    if config.evaluation.teacher_alone and config.task != "evaluate":
        yield FieldViolation(
            "evaluation.teacher_alone",
            "is for task: evaluate; a run that trains has a student. Leave it out.",
        )
    if config.task == "evaluate":
        yield from _check_task(config)


def _check_names(config: RunConfig) -> Iterator[FieldViolation]:
    seen: set[str] = set()
    for number, each in enumerate(config.evaluation.sets):
        field = f"evaluation.sets[{number}].name"
        if each.name and not _NAME.fullmatch(each.name):
            yield FieldViolation(
                field,
                f'"{each.name}" has other characters than letters, digits, ".", "_" and "-"; change them.',
            )
        elif each.name in (".", ".."):
            yield FieldViolation(field, f'"{each.name}" is a folder\'s own name; give a set another.')
        elif each.name in seen:
            yield FieldViolation(field, f'"{each.name}" is given twice; each set needs its own.')
        seen.add(each.name)


def _check_metrics(settings: SetSettings) -> Iterator[FieldViolation]:
    if not settings.has_choices:
        return
    if not settings.name:
        yield FieldViolation(
            "evaluation.match",
            '"choices" needs rows with choices; name them in evaluation.sets with match: choices.',
        )
        return
    others = [each for each in settings.metrics if each not in CHOICE_METRICS]
    if others:
        yield FieldViolation(
            f"{settings.field}.metrics",
            f"has {', '.join(others)}, and the rows of match: choices have accuracy and ece alone. Leave it out, or name the "
            "file in another set.",
        )


def _check_best(config: RunConfig) -> Iterator[FieldViolation]:
    name = config.evaluation.best_metric
    known = [value for each in settled_sets(config) for value in each.values]
    if config.task not in ("distil", CLASSIFICATION):
        yield FieldViolation(
            "evaluation.best_metric", f"has no meaning with task: {config.task}; leave it out."
        )
    elif name not in known:
        yield FieldViolation(
            "evaluation.best_metric",
            f'"{name}" is none of the evaluation\'s values: {", ".join(known)}. Name one of them, or add it to '
            "evaluation.metrics.",
        )


def _check_task(config: RunConfig) -> Iterator[FieldViolation]:
    if not (config.data.train or config.data.eval or config.evaluation.sets):
        yield FieldViolation(
            "data.eval",
            "is empty, and task: evaluate has no rows without it; name rows there or in evaluation.sets.",
        )
    if config.student.lora is not None:
        yield FieldViolation(
            "student.lora",
            "would be a new adapter, and task: evaluate trains none. Name one in student.adapter, or leave it out.",
        )
    if config.evaluation.teacher_alone:
        yield from _check_teacher_alone(config)
    if "alm" in config.evaluation.metrics:
        yield FieldViolation(
            "evaluation.metrics",
            'has "alm", which a run that trains computes; task: evaluate does not. Leave it out.',
        )


def _check_teacher_alone(config: RunConfig) -> Iterator[FieldViolation]:
    if len(config.teachers) != 1 or config.is_offline:
        yield FieldViolation(
            "evaluation.teacher_alone",
            "scores one teacher that is served; name one in teachers, without a cache alone.",
        )
    compared = [each for each in config.evaluation.metrics if each in TEACHER_METRICS]
    if compared:
        yield FieldViolation(
            "evaluation.metrics",
            f"has {', '.join(compared)}, which compares a student with the teacher; leave it out with teacher_alone.",
        )
    if config.evaluation.baseline is not None:
        yield FieldViolation("evaluation.baseline", "has no meaning with teacher_alone; leave it out.")
