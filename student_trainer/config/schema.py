"""A run's configuration as frozen dataclasses, field by field as RunSpec has it: types, defaults, ranges and choices.

The meaning of a field is its comment in run.proto; docs/reference/run-file.md shows both together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, get_args

from stillhouse.protos.evaluation.names import MATCHES, METRICS
from stillhouse.student_trainer.config.data import DataConfig as DataConfig  # noqa: PLC0414 - re-exported
from stillhouse.student_trainer.config.data import DatasetConfig as DatasetConfig  # noqa: PLC0414 - re-exported
from stillhouse.student_trainer.config.evaluation_set import EvaluationSetConfig
from stillhouse.student_trainer.config.fields import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    ByWord,
    Choices,
    DefaultText,
    MaxLength,
    Range,
    Required,
)
from stillhouse.student_trainer.config.resources import (
    CheckpointConfig,
    NotifyConfig,
    ResourceConfig,
    RetryConfig,
    TrackerConfig,
)
from stillhouse.student_trainer.config.student import LoraConfig as LoraConfig  # noqa: PLC0414 - re-exported
from stillhouse.student_trainer.config.student import StudentConfig as StudentConfig  # noqa: PLC0414 - re-exported
from stillhouse.student_trainer.config.target_names import TargetForm
from stillhouse.student_trainer.config.teacher import TeacherConfig

DIVERGENCE_PARAMETERS: Mapping[str, Mapping[str, float]] = {
    "jsd": {"beta": 0.5},
    "jsd_normalised": {"beta": 0.5},
    "skew_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "alpha_beta": {"alpha": 0.5, "beta": 0.5},
    "adaptive_kl": {"mu": 0.5},
}
"""The parameters of each divergence that has any, with their defaults."""
ALL_LINEAR = "all-linear"
"""Word of PEFT for every linear layer but the output layer."""
CLASSIFICATION = "sequence_classification"
"""Task of a run that trains a classifier."""
CLASSIFICATION_CACHE = "classification_cache"
"""Task of a run that stores the classes that such a run would query."""
LORA_LEARNING_RATE = 1e-4
FULL_LEARNING_RATE = 1e-5
BATCH_SIZE = 8
"""Rows of an update."""
MAX_BATCH_SIZE = 65_536
"""Most rows of an update: a process holds all of them, and their targets, at once."""
MICRO_BATCH_SIZE = 8
"""Rows of a forward pass that is cut by rows."""
MAX_SPLIT_ROWS = 512
"""Rows that `data.eval_fraction` holds out at most."""
MAX_TOP_K = 256
OWN_DRAWS = 512
"""Draws of the student beside its top-k, in its own texts. Fewer leave noise in the output layer's rows of rare tokens, which
AdamW, scaling each weight by its own noise, does not average away: measured in docs/log.md."""
BUCKET_TOP_K = 64
"""Default of top_k where one bucket stands for all other tokens."""
DRAWN_TOP_K = 16
"""Default of top_k where `auto` takes draws."""
EXAMPLES = 4
"""Rows of each set of an evaluation whose tokens are written."""
MAX_EXAMPLES = 64
NAME = MaxLength(200)


def _parameter_default(name: str) -> DefaultText:
    having = ((each[name], divergence) for divergence, each in DIVERGENCE_PARAMETERS.items() if name in each)
    return DefaultText(", ".join(f"{value:g} for {divergence}" for value, divergence in having))


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """Sampling of text."""

    temperature: Annotated[float, POSITIVE] = 1.0
    top_p: Annotated[float, Range(0, 1, open_low=True)] = 1.0
    max_new_tokens: Annotated[int, COUNT] = 512
    samples_per_prompt: Annotated[int, COUNT] = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetContextConfig:
    """The dataset's own completions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherContextConfig:
    """Completions that a teacher generates during the run."""

    generation: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentContextConfig:
    """Completions that the student generates during the run."""

    generation: RolloutConfig = field(default_factory=RolloutConfig)
    rollout_target: str = ""
    max_staleness: Annotated[
        int | None,
        NOT_NEGATIVE,
        DefaultText("0 where training, sampling and teacher share the CPU of one machine, else 1"),
    ] = None
    max_importance_weight: Annotated[float, POSITIVE] = 2.0
    min_teacher_logprob: Annotated[
        float | None, Range(-1e6, 0), DefaultText("that of a blind guess, -log(vocabulary)")
    ] = None
    rollout_credential: str = ""
    rollout_tls_server_name: str = ""
    rollout_targets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTermConfig:
    """One divergence between teacher and student."""

    divergence: Annotated[
        str,
        Choices(
            *("forward_kl", "reverse_kl", "jsd", "jsd_normalised", "tvd", "skew_kl", "skew_reverse_kl"),
            *("alpha_beta", "adaptive_kl", "mse"),
        ),
    ] = "forward_kl"
    weight: Annotated[float, NOT_NEGATIVE] = 1.0
    alpha: Annotated[float | None, NOT_NEGATIVE, _parameter_default("alpha")] = None
    beta: Annotated[float | None, NOT_NEGATIVE, _parameter_default("beta")] = None
    mu: Annotated[float | None, NOT_NEGATIVE, _parameter_default("mu")] = None
    estimator: Annotated[str, Choices("full", "policy_gradient")] = "full"
    token_weighting: Annotated[str, Choices("uniform", "teacher_entropy", "teacher_confidence")] = "uniform"  # noqa: S105
    baseline: Annotated[str, Choices("none", "batch", "group", "position")] = "none"

    @property
    def parameters(self) -> Mapping[str, float]:
        """The parameters of its divergence, by name, with their defaults."""
        given = {name: getattr(self, name) for name in ("alpha", "beta", "mu")}
        return {
            name: default if given[name] is None else given[name]
            for name, default in DIVERGENCE_PARAMETERS.get(self.divergence, {}).items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerPairConfig:
    """Two layers whose states are compared."""

    teacher: Annotated[
        int | None, NOT_NEGATIVE, Required("is required: a number of the teacher's layers.")
    ] = None
    student: Annotated[
        int | None, NOT_NEGATIVE, Required("is required: a number of the student's layers.")
    ] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class HiddenConfig:
    """Comparison of hidden states."""

    weight: Annotated[float, NOT_NEGATIVE] = 1.0
    normalise: bool = False
    layers: tuple[LayerPairConfig, ...] = ()
    layers_reason: Annotated[str, MaxLength(1000)] = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """The objective: the sum of the terms plus hard_weight x cross-entropy."""

    terms: tuple[LossTermConfig, ...] = (LossTermConfig(),)
    hard_weight: Annotated[float, NOT_NEGATIVE] = 0.0
    temperature: Annotated[float, POSITIVE] = 1.0
    temperature_mode: Annotated[str, Choices("exact", "conditional")] = "exact"
    reduction: Annotated[str, Choices("token_mean", "sequence_mean")] = "token_mean"
    top_k: Annotated[
        int | None,
        Range(1, MAX_TOP_K),
        DefaultText(f"{DRAWN_TOP_K} where auto takes draws, else {BUCKET_TOP_K}"),
    ] = None
    sparse_target: Annotated[str, Choices("auto", *get_args(TargetForm))] = "auto"
    num_samples: Annotated[
        int | None,
        COUNT,
        DefaultText(
            "where auto takes draws of the teacher as many as fit beside top_k into 272 bytes, and 48 at least; where it takes "
            f"the student's {OWN_DRAWS}, fewer for very long texts; else 50"
        ),
    ] = None
    foreign_tokenizer: Annotated[str, Choices("refuse", "alm")] = "refuse"
    chunk_temperature: Annotated[float, POSITIVE] = 100.0
    chunks: Annotated[str, Choices("shortest", "words")] = "shortest"
    sparse_target_reason: Annotated[str, MaxLength(1000)] = ""
    hidden_mse: HiddenConfig | None = None
    draw_logprobs: Annotated[
        bool | None,
        DefaultText("false for forward_kl alone below temperature 2, else true; or as the cache holds"),
    ] = None

    @property
    def least_top_k(self) -> int:
        """Top-k of the tokens to query; the smaller default while `auto` is not settled."""
        return DRAWN_TOP_K if self.top_k is None else self.top_k

    @property
    def asks_teacher(self) -> bool:
        """True if the loss needs a teacher's outputs."""
        return any(term.weight > 0 for term in self.terms) or self.compares_hidden

    @property
    def compares_hidden(self) -> bool:
        """True if hidden states count."""
        return self.hidden_mse is not None and self.hidden_mse.weight > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextConfig:
    """One origin of completions; exactly one of the three sources is set."""

    weight: Annotated[float, POSITIVE] = 1.0
    dataset: DatasetContextConfig | None = None
    teacher: TeacherContextConfig | None = None
    student: StudentContextConfig | None = None
    loss: LossConfig | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """The store of teachers' outputs."""

    path: Annotated[str, Required('is required, such as "caches/my-set".')] = ""
    mode: Annotated[str, Choices("read", "write_through", "only")] = "write_through"
    codec: Annotated[str, Choices("lossless", "compact")] = "lossless"


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Minimisation of the loss."""

    name: Annotated[str, Choices("adamw", "adam", "sgd", "adamw_8bit", "paged_adamw_8bit")] = "adamw"
    learning_rate: Annotated[
        float,
        POSITIVE,
        DefaultText(f"{LORA_LEARNING_RATE:g} with an adapter, else {FULL_LEARNING_RATE:g}"),
    ] = FULL_LEARNING_RATE
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.01
    lr_scheduler: Annotated[str, Choices("cosine", "linear", "constant")] = "cosine"
    warmup_fraction: Annotated[float, Range(0, 1)] = 0.03
    batch_size: Annotated[
        int | None,
        Range(1, MAX_BATCH_SIZE),
        DefaultText(f"{BATCH_SIZE}; else micro_batch_size x grad_accum_steps"),
    ] = None
    micro_batch_tokens: Annotated[
        int | None, COUNT, DefaultText("auto, from a trial of the run's largest pass")
    ] = None
    micro_batch_size: Annotated[
        int | None, COUNT, DefaultText(f"unset; {MICRO_BATCH_SIZE} with grad_accum_steps")
    ] = None
    grad_accum_steps: Annotated[int | None, COUNT, DefaultText("unset; 1 with micro_batch_size")] = None
    max_grad_norm: Annotated[float, NOT_NEGATIVE] = 1.0
    epochs: Annotated[float, POSITIVE] = 1.0
    max_steps: Annotated[int | None, COUNT] = None
    precision: Annotated[
        str | None, Choices("bf16", "fp16", "fp32"), DefaultText("bf16 on a GPU, fp32 on a CPU")
    ] = None
    seed: Annotated[int, NOT_NEGATIVE] = 0
    matmul_dtype: Annotated[
        str | None,
        Choices("bfloat16", "float32"),
        DefaultText("with fp32 float32, with bf16 the faster one on the run's processor"),
    ] = None

    @property
    def cuts_by_rows(self) -> bool:
        """True if a forward pass is given by its rows, as run files before batch_size did."""
        return self.micro_batch_size is not None or self.grad_accum_steps is not None

    @property
    def rows_per_pass(self) -> int:
        """Rows of a forward pass that is cut by rows."""
        return MICRO_BATCH_SIZE if self.micro_batch_size is None else self.micro_batch_size

    @property
    def rows_per_update(self) -> int:
        """Rows of one update, over all processes."""
        if self.cuts_by_rows:
            return self.rows_per_pass * (1 if self.grad_accum_steps is None else self.grad_accum_steps)
        return BATCH_SIZE if self.batch_size is None else self.batch_size


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Evaluation of the student, besides the start and the end."""

    every_steps: Annotated[int | None, COUNT] = None
    every_epochs: Annotated[float | None, POSITIVE] = None
    metrics: Annotated[
        tuple[str, ...],
        Choices(*METRICS, "f1"),
        DefaultText(
            "kl, perplexity and agreement; alm and perplexity across tokenizers; perplexity without a teacher; of a classifier "
            "accuracy, f1, ece, kl and agreement"
        ),
    ] = ()
    limit: Annotated[int | None, COUNT] = None
    generation: RolloutConfig | None = None
    best_metric: Annotated[str, MaxLength(200)] = ""
    top_k: Annotated[int, Range(1, MAX_TOP_K), DefaultText("loss.top_k")] = 64
    sets: tuple[EvaluationSetConfig, ...] = ()
    match: Annotated[str, Choices(*MATCHES)] = "exact"
    baseline: StudentConfig | None = None
    teacher_alone: bool = False
    examples: Annotated[int, Range(0, MAX_EXAMPLES), DefaultText("4; 0 for a classifier")] = EXAMPLES


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """The whole configuration of a run."""

    display_name: Annotated[str, NAME] = ""
    task: Annotated[str, Choices("distil", "cache", "evaluate", CLASSIFICATION, CLASSIFICATION_CACHE)] = (
        "distil"
    )
    student: StudentConfig = field(default_factory=StudentConfig)
    teachers: tuple[TeacherConfig, ...] = ()
    data: DataConfig = field(default_factory=DataConfig)
    contexts: tuple[ContextConfig, ...] = (ContextConfig(dataset=DatasetContextConfig()),)
    cache: CacheConfig | None = None
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    resources: ResourceConfig = field(default_factory=ResourceConfig)
    retry: RetryConfig = field(default_factory=RetryConfig)
    labels: Mapping[str, str] = field(default_factory=dict)
    preset: Annotated[str, Choices("none", "system0", "system4")] = "none"
    notify: tuple[NotifyConfig, ...] = ()
    trackers: Annotated[tuple[TrackerConfig, ...], ByWord("kind")] = ()

    @property
    def classifies(self) -> bool:
        """True if the student is a classifier."""
        return self.task in (CLASSIFICATION, CLASSIFICATION_CACHE)

    @property
    def builds_cache(self) -> bool:
        """True if nothing is trained, and teachers' outputs are stored."""
        return self.task in ("cache", CLASSIFICATION_CACHE)

    @property
    def has_teacher(self) -> bool:
        """True if a teacher's outputs can be had: from a service, or from a cache."""
        return bool(self.teachers) or self.is_offline

    @property
    def is_offline(self) -> bool:
        """True if all teacher outputs come from a cache, and no service is queried."""
        return self.cache is not None and self.cache.mode == "only"

    def loss_of(self, context: ContextConfig) -> LossConfig:
        """The objective on the rows of `context`."""
        return context.loss or self.loss

    @property
    def asks_teacher(self) -> bool:
        """True if training needs a teacher, to score or to generate."""
        return any(context.dataset is None or self.loss_of(context).asks_teacher for context in self.contexts)
