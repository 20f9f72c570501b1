"""Checks combinations of contexts, teachers, student, data and cache that no single field shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import date

from stillhouse.protos.errors import FieldViolation
from stillhouse.protos.rows.conversation import is_json_list, parse_options, parse_tools
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.row_forms import field_meant
from stillhouse.student_trainer.config.rules.loss import DRAWN_TARGETS, STUDENT_TAIL
from stillhouse.student_trainer.config.schema import (
    ContextConfig,
    LossConfig,
    RunConfig,
    StudentContextConfig,
)

TEACHER_WEIGHTED = ("forward_kl", "skew_kl", "mse")
"""Divergences that weigh tokens by the teacher's probabilities, so that its top-k is support enough."""


def check_contexts(config: RunConfig) -> Iterator[FieldViolation]:
    """Problems of `contexts` and of the losses that count in them."""
    if not config.contexts:
        yield FieldViolation("contexts", "is empty; leave the field out for the dataset alone.")
    reductions = {config.loss_of(context).reduction for context in config.contexts}
    if len(reductions) > 1:
        yield FieldViolation(
            "contexts",
            f"have losses with different reductions ({', '.join(sorted(reductions))}), whose denominators cannot be "
            "added. Give all losses the same.",
        )
    for i, context in enumerate(config.contexts):
        path = f"contexts[{i}]"
        sources = [context.dataset, context.teacher, context.student]
        if sum(source is not None for source in sources) != 1:
            yield FieldViolation(path, "needs exactly one source: dataset, teacher or student.")
            continue
        field = f"{path}.loss" if context.loss else "loss"
        yield from _check_source(config, context, path, field)
        yield from _check_policy_gradient(context, config.loss_of(context), field)


def _check_source(
    config: RunConfig, context: ContextConfig, path: str, field: str
) -> Iterator[FieldViolation]:
    loss = config.loss_of(context)
    if context.dataset is None and not config.teachers:
        yield FieldViolation(path, "needs a teacher, and teachers is empty; name one.")
    if context.teacher is not None and is_ensemble(config):
        yield FieldViolation(
            path,
            "lets a teacher generate, but several are mixed. Keep one teacher, or set data.teacher_field so that each "
            "row has its own.",
        )
    if context.student is None and loss.sparse_target == STUDENT_TAIL:
        yield FieldViolation(
            f"{field}.sparse_target",
            f'is "{STUDENT_TAIL}", whose ids the student draws while it generates, and here it does not. Use "auto"; a student '
            "context may have a loss of its own.",
        )
    if context.student is not None:
        if rollout_services(context.student) and not config.student.trains_adapter:
            named = "rollout_target" if context.student.rollout_target else "rollout_targets"
            yield FieldViolation(
                f"{path}.student.{named}",
                "needs an adapter that can travel there; add student.lora: {}, or leave it out so that the training "
                "process samples by itself.",
            )
        for name in ("rollout_credential", "rollout_tls_server_name"):
            if getattr(context.student, name) and not rollout_services(context.student):
                yield FieldViolation(
                    f"{path}.student.{name}", "is for the service at rollout_target, which is not set."
                )
        if loss.hard_weight:
            yield FieldViolation(
                f"{field}.hard_weight",
                f"is {loss.hard_weight:g} for text that the student generates, from which cross-entropy learns "
                "nothing. Give the student's context a loss of its own with hard_weight: 0.",
            )
        if not loss.asks_teacher:
            yield FieldViolation(
                f"{field}.terms", "have no weight, and the student's own text has no other target."
            )


def _check_policy_gradient(context: ContextConfig, loss: LossConfig, field: str) -> Iterator[FieldViolation]:
    samples = context.student.generation.samples_per_prompt if context.student else 0
    for i, term in enumerate(loss.terms):
        path = f"{field}.terms[{i}]"
        if term.baseline != "none" and term.estimator != "policy_gradient":
            yield FieldViolation(
                f"{path}.baseline",
                f'is "{term.baseline}", which a loss without sampled advantages has no use for. Set '
                "estimator: policy_gradient, or leave it out.",
            )
        if term.estimator != "policy_gradient" or term.weight == 0:
            continue
        if term.baseline in ("group", "position") and samples == 1:
            yield FieldViolation(
                f"{path}.baseline",
                f'is "{term.baseline}", a mean over the other texts of a prompt, and samples_per_prompt is 1. Raise that, or '
                'use "batch".',
            )
        if context.student is None:
            yield FieldViolation(
                f"{path}.estimator",
                '"policy_gradient" needs tokens that the student sampled; use it in a context with student: {}.',
            )
        if term.divergence != "reverse_kl":
            yield FieldViolation(
                f"{path}.divergence",
                f'is "{term.divergence}"; the policy gradient is that of "reverse_kl". Use this, or estimator: full.',
            )
        if loss.temperature != 1:
            yield FieldViolation(
                f"{field}.temperature",
                f"is {loss.temperature:g}; tokens are scored at temperature 1, so a policy gradient needs 1.",
            )


def check_teachers(config: RunConfig) -> Iterator[FieldViolation]:
    """Problems of several teachers: their names, and what a mixture of distributions cannot give."""
    if len(config.teachers) > 1 or config.data.teacher_field:
        counts = Counter(teacher.name for teacher in config.teachers)
        for i, teacher in enumerate(config.teachers):
            if not teacher.name:
                yield FieldViolation(
                    f"teachers[{i}].name", "is required where there are several, or rows name theirs."
                )
            elif counts[teacher.name] > 1:
                yield FieldViolation(
                    f"teachers[{i}].name", f'"{teacher.name}" is given twice; each needs its own.'
                )
    if config.data.date and not _is_date(config.data.date):
        yield FieldViolation("data.date", f'"{config.data.date[:20]}" is no day such as 2025-01-31.')
    if config.data.teacher_field and not config.teachers:
        yield FieldViolation("data.teacher_field", "names the teacher of a row, but teachers is empty.")
    if not is_ensemble(config) or config.classifies:
        return
    for path, loss in run_losses(config):
        if loss.temperature != 1 and loss.temperature_mode == "exact" and loss.asks_teacher:
            yield FieldViolation(
                f"{path}.temperature_mode",
                '"exact" needs the log-partition of the mixture of teachers, which those of its parts do not give. '
                'Use "conditional", or temperature 1.',
            )
        if loss.sparse_target in DRAWN_TARGETS:
            yield FieldViolation(
                f"{path}.sparse_target",
                f'"{loss.sparse_target}" needs samples of one teacher; several are mixed. Use "tail_bucket".',
            )


def check_student(config: RunConfig) -> Iterator[FieldViolation]:
    """Problems of the student's base, adapter and output."""
    student = config.student
    if student.lora is not None and student.adapter:
        yield FieldViolation(
            "student.lora",
            "is set beside student.adapter, whose own rank and modules count. Leave student.lora out.",
        )
    if not student.trains_adapter and student.quantization in ("int8", "nf4"):
        yield FieldViolation(
            "student.quantization",
            f'"{student.quantization}" freezes the base; add student.lora: {{}} to train it.',
        )
    if not student.trains_adapter and student.output in ("adapter", "both"):
        yield FieldViolation(
            "student.output", f'"{student.output}" needs student.lora; there is no adapter without.'
        )
    if list(student.keep_layers) != sorted(set(student.keep_layers)):
        yield FieldViolation(
            "student.keep_layers", "must ascend, each layer once: their order is that of the deeper model."
        )


def check_data(config: RunConfig) -> Iterator[FieldViolation]:
    """Problems of the mixture of datasets."""
    weighted = [dataset.weight is not None for dataset in config.data.train]
    if any(weighted) and not all(weighted):
        yield FieldViolation(
            f"data.train[{weighted.index(False)}].weight",
            "is missing while other datasets have one; give all of them a weight, or none.",
        )
    for i, dataset in enumerate(config.data.eval):
        if dataset.weight is not None:
            yield FieldViolation(
                f"data.eval[{i}].weight", "has no meaning: every held-out row counts once. Leave it out."
            )
    try:
        parse_options(config.data.chat_template_kwargs)
        if is_json_list(config.data.tools):  # else the path of a file
            parse_tools(config.data.tools)
    except FieldError as error:
        yield FieldViolation(f"data.{error.field}", error.problem)
    for where, datasets in (("train", config.data.train), ("eval", config.data.eval)):
        for i, dataset in enumerate(datasets):
            if "" in dataset.columns.values() or len(set(dataset.columns.values())) < len(dataset.columns):
                yield FieldViolation(
                    f"data.{where}[{i}].columns",
                    "maps each field to a column of its own, such as {prompt: question}; give each one another name.",
                )
            for name in dataset.columns:
                if (meant := field_meant(name)) is not None:
                    yield FieldViolation(
                        f"data.{where}[{i}].columns",
                        f'"{name}" is no field of a row; did you mean "{meant}"?',
                    )


def run_losses(config: RunConfig) -> Iterator[tuple[str, LossConfig]]:
    """Every loss that counts in the run, once, with its path in the file."""
    seen = False
    for i, context in enumerate(config.contexts):
        if context.loss is not None:
            yield f"contexts[{i}].loss", context.loss
        elif not seen:
            seen = True
            yield "loss", config.loss


def query_loss_path(config: RunConfig) -> str:
    """Path of a loss that compares on the student's top-k tokens in its own text; empty if there is none."""
    for i, context in enumerate(config.contexts):
        if context.student is not None and needs_query(config.loss_of(context)):
            return f"contexts[{i}].loss" if context.loss else "loss"
    return ""


def rollout_services(student: StudentContextConfig) -> tuple[str, ...]:
    """Services to sample the student's text from; none if the training process samples it."""
    return tuple(dict.fromkeys(each for each in (student.rollout_target, *student.rollout_targets) if each))


def needs_query(loss: LossConfig) -> bool:
    """True if a loss weighs tokens by the student's probabilities, so that its top-k must be in the support."""
    return any(
        term.weight > 0 and term.estimator == "full" and term.divergence not in TEACHER_WEIGHTED
        for term in loss.terms
    )


def is_ensemble(config: RunConfig) -> bool:
    """True if every row queries several teachers, whose outputs are mixed."""
    return len(config.teachers) > 1 and not config.data.teacher_field


def check_cache(config: RunConfig) -> Iterator[FieldViolation]:
    """Problems of `cache`, and of a run whose task is to build one."""
    if config.builds_cache:
        yield from _check_build(config)
    for i, context in enumerate(config.contexts):
        if config.is_offline and context.dataset is None:
            yield FieldViolation(
                f"contexts[{i}]",
                "generates text during the run, and cache.mode: only queries no teacher. Build a cache of the teacher's "
                "texts with this context, then train on data.train: [{path: caches/...}], which holds them.",
            )


def _check_build(config: RunConfig) -> Iterator[FieldViolation]:
    if config.cache is None:
        yield FieldViolation(
            "cache", f'is required with task: {config.task}; name a place, such as {{path: "caches/my-set"}}.'
        )
    elif config.cache.mode != "write_through":
        yield FieldViolation("cache.mode", f'is "{config.cache.mode}", which keeps nothing; leave it out.')
    if not config.teachers:
        yield FieldViolation("teachers", f"is empty, and task: {config.task} queries one; name it.")
    for i, context in enumerate(config.contexts):
        if context.student is not None:
            yield FieldViolation(
                f"contexts[{i}]",
                "is text of a student that changes as it trains, which task: cache cannot keep; leave it out.",
            )


def _is_date(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
