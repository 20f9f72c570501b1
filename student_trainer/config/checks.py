"""Checks a run's configuration: the rules of its fields and their combinations, all problems at once by field path."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from stillhouse.protos.errors import FieldViolation, Reason, StillhouseError
from stillhouse.student_trainer.config.fields import (
    Choices,
    FieldInfo,
    JsonText,
    Lines,
    MaxLength,
    Range,
    Required,
    fields_of,
)
from stillhouse.student_trainer.config.resources import MAX_PROCESSES
from stillhouse.student_trainer.config.rules.classification import check_classification
from stillhouse.student_trainer.config.rules.contexts import (
    check_cache,
    check_contexts,
    check_data,
    check_student,
    check_teachers,
    run_losses,
)
from stillhouse.student_trainer.config.rules.cross_tokenizer import check_cross_tokenizer
from stillhouse.student_trainer.config.rules.evaluation import check_evaluation, teacher_metrics
from stillhouse.student_trainer.config.rules.hidden_states import check_hidden_states
from stillhouse.student_trainer.config.rules.loss import check_loss
from stillhouse.student_trainer.config.rules.teacher_prompt import check_teacher_prompts
from stillhouse.student_trainer.config.rules.trackers import check_trackers
from stillhouse.student_trainer.config.schema import MAX_BATCH_SIZE, RunConfig
from stillhouse.student_trainer.config.value_synonyms import nearest_value

MAX_COMPARED_CHARACTERS = 200
"""Compared characters of an unknown word."""
LEAST_SIMILARITY = 0.82
"""Similarity of a slip of the pen: "adamax" is none for "adam"."""


_TARGET = re.compile(r"unix:.+|(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})")


def check(config: RunConfig) -> None:
    """Return if `config` can be run.

    Raises:
        StillhouseError: INVALID_SPEC with one violation for each problem.
    """
    violations = problems_of(config)
    if violations:
        raise invalid_spec(violations)


def problems_of(config: RunConfig) -> list[FieldViolation]:
    """One violation for each problem of `config`."""
    return [*_check_fields(config), *_check_addresses(config), *_check_combinations(config)]


def invalid_spec(violations: Sequence[FieldViolation]) -> StillhouseError:
    """The error that reports `violations`, one clause for each."""
    return StillhouseError(
        Reason.INVALID_SPEC,
        " ".join(f"{violation.field}: {violation.description}" for violation in violations),
        violations=violations,
    )


def invalid_field(field: str, description: str) -> StillhouseError:
    """The same for one field."""
    return invalid_spec([FieldViolation(field=field, description=description)])


def walk(config: Any, path: str = "") -> Iterator[tuple[str, FieldInfo, Any]]:
    """Path in the file, rules and value of every field below the dataclass `config`; items of lists follow their list."""
    for name, info in fields_of(type(config)).items():
        value = getattr(config, name)
        here = f"{path}.{name}" if path else name
        yield here, info, value
        for item_path, item in (
            [(f"{here}[{i}]", item) for i, item in enumerate(value)] if info.repeated else [(here, value)]
        ):
            if info.repeated:
                yield item_path, info, item
            if dataclasses.is_dataclass(item):
                yield from walk(item, item_path)


def _check_fields(config: RunConfig) -> Iterator[FieldViolation]:
    """Checks each value against the rules of its field alone."""
    for path, info, value in walk(config):
        required = info.rule(Required)
        if required is not None and value in (None, "", ()) and not _may_lack(required, config):
            yield FieldViolation(path, required.sentence)
            continue
        problem = None if value is None or isinstance(value, tuple) else _problem(info, value)
        if problem:
            yield FieldViolation(path, problem)


def _may_lack(required: Required, config: RunConfig) -> bool:
    return (required.unless_offline and config.is_offline) or required.unless_task == config.task


def _problem(info: FieldInfo, value: Any) -> str | None:
    words = info.rule(Choices)
    span, longest = info.rule(Range), info.rule(MaxLength)
    if words is not None and value not in words:
        return _unknown_choice(value, words)
    if span is not None and not span.holds(value):
        return f"{value} is out of range; it must be {span}."
    is_one_line = not (info.rule(Lines) or info.rule(JsonText))
    if isinstance(value, str) and is_one_line and not value.isprintable():
        return f"{value!r} holds a control character; remove it."
    if longest is not None and len(value) > longest.characters:
        return f"has {len(value)} characters; at most {longest.characters} are kept. Shorten it."
    return None


def _unknown_choice(value: str, choices: Sequence[str]) -> str:
    spelled = value[:MAX_COMPARED_CHARACTERS].lower().replace("-", "_")
    nearest = spelled if spelled in choices else nearest_value(spelled, choices) or _slip(spelled, choices)
    hint = f'; did you mean "{nearest}"?' if nearest else "."
    return f'"{value}" is not known{hint} Possible: {_listed(choices)}.'


def _slip(value: str, choices: Sequence[str]) -> str | None:
    """Returns the choice that `value` is a slip of the pen for: another number in it, such as int4 for int8, is none."""
    near = difflib.get_close_matches(value, choices, n=1, cutoff=LEAST_SIMILARITY)
    digits = re.findall(r"\d+", value)
    return next((each for each in near if re.findall(r"\d+", each) == digits), None)


def _listed(values: Collection[object]) -> str:
    return ", ".join(_quoted(value) for value in values)


def _quoted(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _check_addresses(config: RunConfig) -> Iterator[FieldViolation]:
    named = {f"teachers[{i}].targets": each.targets for i, each in enumerate(config.teachers)}
    for i, context in enumerate(config.contexts):
        if context.student is not None:
            named[f"contexts[{i}].student.rollout_targets"] = context.student.rollout_targets
    for path, targets in named.items():
        for i, target in enumerate(targets):
            match = _TARGET.fullmatch(target)
            if not match or int(match[2] or 0) > 65535:
                yield FieldViolation(f"{path}[{i}]", f'"{target}" is neither host:port nor unix:PATH.')


def _check_combinations(config: RunConfig) -> Iterator[FieldViolation]:
    """Checks combinations of fields."""
    for check_part in (
        check_student,
        check_teachers,
        check_contexts,
        check_data,
        check_cache,
        check_cross_tokenizer,
        check_evaluation,
        check_teacher_prompts,
        check_classification,
        check_hidden_states,
        check_trackers,
        _check_teachers,
        _check_processes,
        _check_passes,
    ):
        yield from check_part(config)
    if config.task != "evaluate":
        for path, loss in run_losses(config):
            yield from check_loss(path, loss)


def _check_processes(config: RunConfig) -> Iterator[FieldViolation]:
    """Devices and processes: one for each device, and what several cannot share."""
    resources = config.resources
    if resources.gpus and resources.gpu_count is not None:
        yield FieldViolation("resources.gpu_count", "is set beside gpus; give one of the two.")
    if len(set(resources.gpus)) != len(resources.gpus):
        yield FieldViolation("resources.gpus", "names a device twice; name each once.")
    num_gpus = len(resources.gpus) or resources.gpu_count or 0
    if num_gpus > MAX_PROCESSES:
        field = "gpus" if resources.gpus else "gpu_count"
        yield FieldViolation(
            f"resources.{field}", f"requests more than the {MAX_PROCESSES} devices that a run can use."
        )
    if resources.num_processes and num_gpus and resources.num_processes != num_gpus:
        yield FieldViolation(
            "resources.num_processes",
            f"is {resources.num_processes} for {num_gpus} devices; every device has one process. Leave it out.",
        )
    if resources.processes == 1:
        return
    if config.builds_cache or config.task == "evaluate":
        work = "builds a cache" if config.builds_cache else "evaluates"
        yield FieldViolation("resources.num_processes", f"is above 1, but one process {work}. Leave it out.")
    if config.cache is not None and config.cache.mode == "write_through":
        yield FieldViolation(
            "cache.mode",
            f'"write_through" has one writer, and this run has {resources.processes} processes. Build the cache first, '
            'with `stillhouse cache build`, and use "read" or "only".',
        )


def _check_passes(config: RunConfig) -> Iterator[FieldViolation]:
    """Rows and tokens of an update: two ways to say them, of which a file takes one."""
    optimizer = config.optimizer
    by_tokens = [
        name for name in ("batch_size", "micro_batch_tokens") if getattr(optimizer, name) is not None
    ]
    if optimizer.cuts_by_rows and by_tokens:
        given = " and ".join(by_tokens)
        yield FieldViolation(
            f"optimizer.{by_tokens[0]}",
            f"is set beside micro_batch_size or grad_accum_steps, which count rows of a pass. Keep {given} and leave those two "
            f"out; optimizer.batch_size: {optimizer.rows_per_update} is the update that they describe.",
        )
    elif optimizer.cuts_by_rows and optimizer.rows_per_update > MAX_BATCH_SIZE:
        yield FieldViolation(
            "optimizer.grad_accum_steps",
            f"{optimizer.grad_accum_steps} x micro_batch_size {optimizer.rows_per_pass} is {optimizer.rows_per_update:,} rows "
            f"of one update; it must be at most {MAX_BATCH_SIZE:,}.",
        )


def _check_teachers(config: RunConfig) -> Iterator[FieldViolation]:
    if config.has_teacher or config.builds_cache:
        return
    compared = teacher_metrics(config)
    if config.asks_teacher:
        yield FieldViolation(
            "teachers",
            "is empty, but the loss needs a teacher; name one, or set every loss.terms weight to 0.",
        )
    elif compared:
        yield FieldViolation(
            "teachers",
            f"is empty, but evaluation.metrics has {_listed(compared)}; name one, or leave these out.",
        )
