"""What a run's configuration must satisfy: choices, ranges and combinations, reported all at once by field path."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from stillhouse.protos.errors import FieldViolation, Reason, StillhouseError
from stillhouse.student_trainer.config.check_contexts import (
    check_cache,
    check_contexts,
    check_data,
    check_student,
    check_teachers,
    losses,
)
from stillhouse.student_trainer.config.check_cross_tokenizer import check_foreign
from stillhouse.student_trainer.config.check_loss import check_loss
from stillhouse.student_trainer.config.schema import RunConfig

MAX_TOP_K = 256
MAX_PROCESSES = 64
"""Of one run."""
MAX_NAME_CHARACTERS = 200
TEACHER_METRICS = frozenset({"kl", "agreement", "alm"})
"""Evaluation metrics that need a teacher's answers."""
CHOICES: Mapping[str, Sequence[str]] = {
    "RunConfig.task": ("distil", "cache", "evaluate"),
    "StudentConfig.quantization": ("none", "int8", "nf4"),
    "StudentConfig.output": ("adapter", "merged", "both"),
    "LoraConfig.bias": ("none", "all", "lora_only"),
    "TeacherConfig.logprob_dtype": ("float16", "float32"),
    "CacheConfig.mode": ("read", "write_through", "only"),
    "CacheConfig.codec": ("lossless", "compact"),
    "DataConfig.overflow": ("truncate", "drop"),
    "LossConfig.temperature_mode": ("exact", "conditional"),
    "LossConfig.reduction": ("token_mean", "sequence_mean"),
    "LossConfig.sparse_target": ("tail_bucket", "sampled", "top_k_and_sampled", "renormalise"),
    "LossConfig.foreign_tokenizer": ("refuse", "alm"),
    "LossConfig.chunks": ("shortest", "words"),
    "LossTermConfig.divergence": (
        *("forward_kl", "reverse_kl", "jsd", "jsd_normalised", "tvd", "skew_kl", "skew_reverse_kl"),
        *("alpha_beta", "adaptive_kl", "mse"),
    ),
    "LossTermConfig.estimator": ("full", "policy_gradient"),
    "LossTermConfig.token_weighting": ("uniform", "teacher_entropy", "teacher_confidence"),
    "LossTermConfig.baseline": ("none", "batch", "group", "position"),
    "OptimizerConfig.name": ("adamw", "adam", "sgd", "adamw_8bit", "paged_adamw_8bit"),
    "OptimizerConfig.lr_scheduler": ("cosine", "linear", "constant"),
    "OptimizerConfig.precision": ("bf16", "fp16", "fp32"),
    "EvaluationConfig.metrics": (
        "kl",
        "perplexity",
        "agreement",
        "cross_entropy",
        "alm",
        "bleu",
        "rouge",
        "accuracy",
    ),
}
"""What a person may write, by class and field."""

SUPPORTED: Mapping[str, Collection[object]] = {
    "RunConfig.task": ("distil", "cache"),
    "EvaluationConfig.metrics": ("kl", "perplexity", "agreement", "cross_entropy", "alm"),
    "EvaluationConfig.best_metric": ("",),
    "EvaluationConfig.generation": (),
}
"""What the training process does, where that is less than the contract has; a feature that lands deletes its line."""


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A range of numbers; an open end is left out of it."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def holds(self, value: float) -> bool:
        """Whether `value` is a finite number in the range."""
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return math.isfinite(value) and above and below

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'above' if self.open_low else 'at least'} {self.low:g}"
        return (
            f"in {'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"
        )


POSITIVE = Interval(0, open_low=True)
COUNT = Interval(1)
NOT_NEGATIVE = Interval(0)

RANGES: Mapping[str, Interval] = {
    "LoraConfig.rank": Interval(1, 1024),
    "LoraConfig.alpha": POSITIVE,
    "LoraConfig.dropout": Interval(0, 1, open_high=True),
    "LoraConfig.layers": NOT_NEGATIVE,
    "StudentConfig.keep_layers": NOT_NEGATIVE,
    "TeacherConfig.weight": POSITIVE,
    "TeacherConfig.prefetch_steps": Interval(1, 64),
    "RolloutConfig.temperature": POSITIVE,
    "RolloutConfig.top_p": Interval(0, 1, open_low=True),
    "RolloutConfig.max_new_tokens": COUNT,
    "RolloutConfig.samples_per_prompt": COUNT,
    "StudentContextConfig.max_staleness": NOT_NEGATIVE,
    "StudentContextConfig.max_importance_weight": POSITIVE,
    "StudentContextConfig.min_teacher_logprob": Interval(-1e6, 0),
    "LossTermConfig.weight": NOT_NEGATIVE,
    "LossTermConfig.alpha": NOT_NEGATIVE,
    "LossTermConfig.beta": NOT_NEGATIVE,
    "LossTermConfig.mu": NOT_NEGATIVE,
    "LossConfig.hard_weight": NOT_NEGATIVE,
    "LossConfig.temperature": POSITIVE,
    "LossConfig.top_k": Interval(1, MAX_TOP_K),
    "LossConfig.chunk_temperature": POSITIVE,
    "LossConfig.num_samples": COUNT,
    "ContextConfig.weight": POSITIVE,
    "DatasetConfig.weight": POSITIVE,
    "DatasetConfig.limit": COUNT,
    "DataConfig.eval_fraction": Interval(0, 1, open_high=True),
    "DataConfig.max_sequence_tokens": Interval(2),
    "OptimizerConfig.learning_rate": POSITIVE,
    "OptimizerConfig.weight_decay": NOT_NEGATIVE,
    "OptimizerConfig.warmup_fraction": Interval(0, 1),
    "OptimizerConfig.micro_batch_size": COUNT,
    "OptimizerConfig.grad_accum_steps": COUNT,
    "OptimizerConfig.max_grad_norm": NOT_NEGATIVE,
    "OptimizerConfig.epochs": POSITIVE,
    "OptimizerConfig.max_steps": COUNT,
    "OptimizerConfig.seed": NOT_NEGATIVE,
    "DataConfig.seed": NOT_NEGATIVE,
    "CheckpointConfig.every_steps": COUNT,
    "CheckpointConfig.every_epochs": POSITIVE,
    "CheckpointConfig.every_seconds": POSITIVE,
    "CheckpointConfig.keep": COUNT,
    "EvaluationConfig.every_steps": COUNT,
    "EvaluationConfig.every_epochs": POSITIVE,
    "EvaluationConfig.limit": COUNT,
    "EvaluationConfig.top_k": Interval(1, MAX_TOP_K),
    "ResourceConfig.gpus": NOT_NEGATIVE,
    "ResourceConfig.gpu_count": NOT_NEGATIVE,
    "ResourceConfig.num_processes": Interval(0, MAX_PROCESSES),
    "RetryConfig.max_attempts": COUNT,
    "RetryConfig.teacher_wait_s": NOT_NEGATIVE,
}
"""The numbers that make sense, by class and field."""

_TARGET = re.compile(r"unix:.+|(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})")


def check(config: RunConfig) -> None:
    """Return if `config` can be run.

    Raises:
        StillhouseError: INVALID_SPEC with one violation for each problem.
    """
    violations = [*_check_values(config), *_check_required(config), *_check_combinations(config)]
    if violations:
        raise invalid_spec(violations)


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


def violation(field: str, description: str) -> FieldViolation:
    """What is wrong with `field`, a path as in the run file."""
    return FieldViolation(field=field, description=description)


def walk(config: Any, path: str = "") -> Iterator[tuple[str, str, Any]]:
    """Path in the file, "Class.field" and value of every field below the dataclass `config`; tuples one by one."""
    for field in dataclasses.fields(config):
        key = f"{type(config).__name__}.{field.name}"
        value = getattr(config, field.name)
        here = f"{path}.{field.name}" if path else field.name
        items = (
            [(f"{here}[{i}]", item) for i, item in enumerate(value)]
            if isinstance(value, tuple)
            else [(here, value)]
        )
        for place, item in items:
            yield place, key, item
            if dataclasses.is_dataclass(item):
                yield from walk(item, place)


def _check_values(config: RunConfig) -> Iterator[FieldViolation]:
    """Each value by itself: known, possible, in range, printable."""
    for path, key, value in walk(config):
        problem = None if value is None else _problem(key, value)
        if problem:
            yield violation(path, problem)


def _problem(key: str, value: Any) -> str | None:
    if key in CHOICES and value not in CHOICES[key]:
        return _unknown_choice(value, CHOICES[key])
    if key in SUPPORTED and value not in SUPPORTED[key]:
        return _unsupported(value, SUPPORTED[key])
    if key in RANGES and not RANGES[key].holds(value):
        return f"{value} is out of range; it must be {RANGES[key]}."
    if isinstance(value, str) and not value.isprintable():
        return f"{value!r} holds a control character; remove it."
    if key in ("RunConfig.display_name", "TeacherConfig.name") and len(value) > MAX_NAME_CHARACTERS:
        return f"has {len(value)} characters; at most {MAX_NAME_CHARACTERS} are kept. Shorten it."
    return None


def _unknown_choice(value: str, choices: Sequence[str]) -> str:
    spelled = value[:MAX_NAME_CHARACTERS].lower().replace("-", "_")
    nearest = difflib.get_close_matches(spelled, choices, n=1)
    hint = f'; did you mean "{nearest[0]}"?' if nearest else "."
    return f'"{value}" is not known{hint} Possible: {_listed(choices)}.'


def _unsupported(value: object, supported: Collection[object]) -> str:
    what = "this" if dataclasses.is_dataclass(value) else _quoted(value)
    if not supported or set(supported) == {""}:
        return f"{what} is in the contract, but the training process cannot do it; leave the field out."
    return f"{what} is in the contract, but the training process cannot do it; use {_listed(supported)}."


def _listed(values: Collection[object]) -> str:
    return ", ".join(_quoted(value) for value in values)


def _quoted(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _check_required(config: RunConfig) -> Iterator[FieldViolation]:
    """What has no default."""
    if not config.student.model:
        yield violation("student.model", "is required: a Hugging Face id or a path on the trainer's host.")
    if not config.data.train:
        yield violation("data.train", 'is required: a list of datasets, such as [{path: "datasets/..."}].')
    for name, datasets in (("train", config.data.train), ("eval", config.data.eval)):
        for i, dataset in enumerate(datasets):
            if not dataset.path:
                yield violation(f"data.{name}[{i}].path", "is required: a file on the trainer's host.")
    for i, teacher in enumerate(config.teachers):
        if not teacher.targets and not config.is_offline:
            yield violation(f"teachers[{i}].targets", 'is required, such as ["127.0.0.1:7401"].')
        yield from _check_targets(f"teachers[{i}].targets", teacher.targets)
    for i, context in enumerate(config.contexts):
        if context.student is not None:
            yield from _check_targets(
                f"contexts[{i}].student.rollout_targets", context.student.rollout_targets
            )


def _check_targets(path: str, targets: Sequence[str]) -> Iterator[FieldViolation]:
    for i, target in enumerate(targets):
        match = _TARGET.fullmatch(target)
        if not match or int(match[2] or 0) > 65535:
            yield violation(f"{path}[{i}]", f'"{target}" is no host:port or unix:PATH.')


def _check_combinations(config: RunConfig) -> Iterator[FieldViolation]:
    """What fits together."""
    for check_part in (check_student, check_teachers, check_contexts, check_data, check_cache, check_foreign):
        yield from check_part(config)
    yield from _check_teachers(config)
    for path, loss in losses(config):
        yield from check_loss(path, loss)
    resources = config.resources
    if resources.gpus and resources.gpu_count is not None:
        yield violation("resources.gpu_count", "is set beside gpus; give one of the two.")
    if len(set(resources.gpus)) != len(resources.gpus):
        yield violation("resources.gpus", "names a device twice; name each once.")
    yield from _check_processes(config)


def _check_processes(config: RunConfig) -> Iterator[FieldViolation]:
    """Several processes: one for each device, and what they cannot share."""
    resources = config.resources
    num_gpus = len(resources.gpus) or resources.gpu_count or 0
    if num_gpus > MAX_PROCESSES:
        field = "gpus" if resources.gpus else "gpu_count"
        yield violation(
            f"resources.{field}", f"asks for more than the {MAX_PROCESSES} devices that a run can use."
        )
    if resources.num_processes and num_gpus and resources.num_processes != num_gpus:
        yield violation(
            "resources.num_processes",
            f"is {resources.num_processes} for {num_gpus} devices; every device has one process. Leave it out.",
        )
    if resources.processes == 1:
        return
    if config.task == "cache":
        yield violation(
            "resources.num_processes", "is above 1, but one process builds a cache. Leave it out."
        )
    if config.cache is not None and config.cache.mode == "write_through":
        yield violation(
            "cache.mode",
            f'"write_through" has one writer, and this run has {resources.processes} processes. Build the cache first, '
            'with `stillhouse cache build`, and use "read" or "only".',
        )


def _check_teachers(config: RunConfig) -> Iterator[FieldViolation]:
    if config.has_teacher or config.task == "cache":
        return
    teacher_metrics = sorted(TEACHER_METRICS.intersection(config.evaluation.metrics))
    if config.asks_teacher:
        yield violation(
            "teachers",
            "is empty, but the loss learns from a teacher; name one, or set every loss.terms weight to 0.",
        )
    elif teacher_metrics:
        yield violation(
            "teachers",
            f"is empty, but evaluation.metrics has {_listed(teacher_metrics)}; name one, or leave these out.",
        )
