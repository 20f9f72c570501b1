"""A run's configuration as frozen dataclasses, field by field as RunSpec has it, with every default that is a plain value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

DIVERGENCE_PARAMETERS: Mapping[str, Mapping[str, float]] = {
    "jsd": {"beta": 0.5},
    "jsd_normalised": {"beta": 0.5},
    "skew_kl": {"alpha": 0.1},
    "skew_reverse_kl": {"alpha": 0.1},
    "alpha_beta": {"alpha": 0.5, "beta": 0.5},
    "adaptive_kl": {"mu": 0.5},
}
"""The parameters of each divergence that has any, with their defaults."""
MAX_SPLIT_ROWS = 512
"""Rows that `data.eval_fraction` holds out at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """A low-rank adapter."""

    rank: int = 16
    """Of the update, in [1, 1024]."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of the adapter's inputs dropped in training, in [0, 1)."""
    target_modules: tuple[str, ...] = ()
    """Module names such as "q_proj"; empty means all linear layers."""
    layers: tuple[int, ...] = ()
    """Layers to adapt; empty means all."""
    bias: str = "none"
    """ "none", "all" or "lora_only"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """The model that learns."""

    model: str = ""
    """Required: Hugging Face id, or a path on the trainer's host."""
    lora: LoraConfig | None = None
    """None trains every weight."""
    quantization: str = "none"
    """How the frozen base is held: "none", "int8" or "nf4"."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    from_config: bool = False
    """Random weights from the model's configuration."""
    revision: str = ""
    """Hub revision; empty means the hub's default."""
    adapter: str = ""
    """Adapter to go on from."""
    keep_layers: tuple[int, ...] = ()
    """Layers to keep of a deeper model; empty means all."""
    output: str = "merged"
    """What is saved at the end: "adapter", "merged" or "both"; without lora all weights, which is "merged"."""

    @property
    def trains_adapter(self) -> bool:
        """Whether the base stays as it is, and an adapter learns."""
        return self.lora is not None or bool(self.adapter)


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherConfig:
    """One teacher service, or one adapter of it."""

    name: str = ""
    """By which rows and metrics speak of it."""
    targets: tuple[str, ...] = ()
    """Required: `host:port` or `unix:PATH` of services that serve the same model."""
    adapter: str = ""
    """Adapter to ask for; empty means the base model."""
    weight: float = 1.0
    """Share in a mixture of teachers."""
    credential: str = ""
    """Section of the trainer's credentials file."""
    tls_server_name: str = ""
    """Name to expect in the teacher's certificate."""
    logprob_dtype: str = "float16"
    """Of the logprobs on the wire: "float16" or "float32"."""
    prefetch_steps: int = 2
    """Optimizer steps whose sequences are in flight ahead of the student, in [1, 64]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutConfig:
    """How text is sampled."""

    temperature: float = 1.0
    """Of the softmax, > 0."""
    top_p: float = 1.0
    """Mass of the nucleus, in (0, 1]."""
    max_new_tokens: int = 512
    """Longest completion, in tokens."""
    samples_per_prompt: int = 4
    """Completions for each prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetContextConfig:
    """The dataset's own completions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherContextConfig:
    """Text that a teacher writes during the run."""

    generation: RolloutConfig = field(default_factory=RolloutConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentContextConfig:
    """Text that the student writes during the run."""

    generation: RolloutConfig = field(default_factory=RolloutConfig)
    rollout_target: str = ""
    """Service to sample from; empty: the training process samples itself."""
    max_staleness: int = 1
    """Updates that a rollout may be old."""
    max_importance_weight: float = 2.0
    """Cap on the importance weight of a token."""
    min_teacher_logprob: float | None = None
    """Mean log-probability per token that the teacher must give the student's first texts; None: that of a blind guess."""
    rollout_credential: str = ""
    """Section of the trainer's credentials file, for rollout_target."""
    rollout_tls_server_name: str = ""
    """Name to expect in its certificate."""
    rollout_targets: tuple[str, ...] = ()
    """Further services like rollout_target, which share the work."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTermConfig:
    """One divergence between teacher and student."""

    divergence: str = "forward_kl"
    weight: float = 1.0
    """In the sum, >= 0; with 0 everywhere no teacher is asked while training."""
    alpha: float | None = None
    """Of skewed and alpha-beta divergences; None where the divergence has none."""
    beta: float | None = None
    """Of alpha-beta and jsd; None where the divergence has none."""
    mu: float | None = None
    """Of adaptive KL; None where the divergence has none."""
    estimator: str = "full"
    """ "full" (over the support) or "policy_gradient"."""
    token_weighting: str = "uniform"  # noqa: S105 (tokens of text)
    """ "uniform", "teacher_entropy" or "teacher_confidence"."""
    baseline: str = "none"
    """Of a policy gradient: "none", "batch", "group" or "position"."""

    @property
    def parameters(self) -> Mapping[str, float]:
        """The parameters of its divergence, by name, with their defaults."""
        given = {name: getattr(self, name) for name in ("alpha", "beta", "mu")}
        return {
            name: default if given[name] is None else given[name]
            for name, default in DIVERGENCE_PARAMETERS.get(self.divergence, {}).items()
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What is minimised: the sum of the terms plus hard_weight x cross-entropy."""

    terms: tuple[LossTermConfig, ...] = (LossTermConfig(),)
    hard_weight: float = 0.0
    """Of the cross-entropy against the text, which is never tempered; >= 0."""
    temperature: float = 1.0
    """Of the terms' softmax, > 0; their gradients are scaled by its square."""
    temperature_mode: str = "exact"
    """ "exact" (needs the teacher's log partitions) or "conditional"."""
    reduction: str = "token_mean"
    """ "token_mean" or "sequence_mean"."""
    top_k: int = 64
    """Likeliest teacher tokens to ask for, in [1, 256]."""
    sparse_target: str = "tail_bucket"
    """What stands for the tokens beyond them; for forward KL better "top_k_and_sampled", top_k 16, num_samples 90."""
    num_samples: int = 50
    """Draws per position for sampled targets."""
    foreign_tokenizer: str = "refuse"
    """How a foreign tokenizer is bridged: "refuse" or "alm"."""
    chunk_temperature: float = 100.0
    """Of the probabilities of chunks of text with "alm", > 0."""
    chunks: str = "shortest"
    """Where chunks end: "shortest" or "words"."""

    @property
    def asks_teacher(self) -> bool:
        """Whether training needs a teacher's answers."""
        return any(term.weight > 0 for term in self.terms)


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextConfig:
    """One origin of completions; exactly one of the three sources is set."""

    weight: float = 1.0
    """Share of rows."""
    dataset: DatasetContextConfig | None = None
    teacher: TeacherContextConfig | None = None
    student: StudentContextConfig | None = None
    loss: LossConfig | None = None
    """Overrides the run's loss for these rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """Where teachers' answers are kept."""

    path: str = ""
    """Required, such as "caches/my-set"."""
    mode: str = "write_through"
    """ "read", "write_through" or "only"."""
    codec: str = "lossless"
    """How answers are kept: "lossless" or "compact"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """One source of rows."""

    path: str = ""
    """Required: JSONL or Parquet file, or a directory saved by Hugging Face datasets."""
    weight: float | None = None
    """Share among the rows; None: every row of every source once an epoch."""
    limit: int | None = None
    """Rows to use at most, from the first; None means all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """The text to train and evaluate on."""

    train: tuple[DatasetConfig, ...] = ()
    eval: tuple[DatasetConfig, ...] = ()
    """Empty means a split of `train`."""
    eval_fraction: float = 0.02
    """Share of `train` held out if `eval` is empty, in [0, 1); at most MAX_SPLIT_ROWS rows."""
    max_sequence_tokens: int = 2048
    overflow: str = "truncate"
    """What happens to longer rows: "truncate" or "drop"."""
    teacher_field: str = ""
    """Field whose value names the teacher of a row."""
    completion_only: bool = True
    """Learn from completions only, not from prompts."""
    packing: bool = False
    """Pack rows without padding."""
    seed: int = 0
    """Of the split and of the order of rows; unset means optimizer.seed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """How the loss is minimised."""

    name: str = "adamw"
    learning_rate: float = 1e-5
    """Peak, > 0; unset means LORA_LEARNING_RATE with lora."""
    weight_decay: float = 0.01
    """Decoupled for adamw, L2 for adam and sgd; >= 0."""
    lr_scheduler: str = "cosine"
    """ "cosine", "linear" or "constant"."""
    warmup_fraction: float = 0.03
    """Share of the steps over which the learning rate rises from 0, in [0, 1]."""
    micro_batch_size: int = 8
    """Sequences in one forward pass of one process."""
    grad_accum_steps: int = 1
    """Forward passes in one update, of all processes together: several share the same update."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm; 0 means no clipping."""
    epochs: float = 1.0
    """Passes over the training rows, > 0."""
    max_steps: int | None = None
    """Overrides epochs."""
    precision: str | None = None
    """ "bf16", "fp16" or "fp32"; None: bf16 on a GPU and fp32 on a CPU, which the run service settles."""
    seed: int = 0
    """Of initial weights, dropout and order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When a checkpoint is written, besides the end; several may be set, and each counts by itself."""

    every_steps: int | None = None
    """Unset means CHECKPOINT_EVERY_STEPS if the two below are unset too."""
    every_epochs: float | None = None
    every_seconds: float | None = None
    keep: int = 2
    """Newest checkpoints kept, >= 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """When and how the student is evaluated, besides the start and the end."""

    every_steps: int | None = None
    every_epochs: float | None = None
    metrics: tuple[str, ...] = ()
    """Unset means "kl", "perplexity" and "agreement", or "perplexity" alone if there is no teacher."""
    limit: int | None = None
    """Rows to use at most; None means all."""
    generation: RolloutConfig | None = None
    """How the student writes, for metrics of text."""
    best_metric: str = ""
    """Metric by which the best checkpoint is kept."""
    top_k: int = 64
    """Likeliest teacher tokens to ask for on held-out rows; unset means loss.top_k."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourceConfig:
    """What the run may use."""

    gpus: tuple[int, ...] = ()
    """Device indices; empty: as many free ones as gpu_count says."""
    gpu_count: int | None = None
    """None: one where the service has any, else the CPU."""
    num_processes: int = 0
    """0 means one for each GPU, at least one."""

    @property
    def processes(self) -> int:
        """Training processes of the run."""
        return self.num_processes or max(1, len(self.gpus) or self.gpu_count or 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryConfig:
    """What happens when something breaks."""

    max_attempts: int = 1
    """Processes that may be started for the run without being asked."""
    teacher_wait_s: float = 3600.0
    """Time that the run waits for a teacher that does not answer."""
    halve_micro_batch: bool = False
    """After running out of memory, try once with half the micro-batch and twice the accumulation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that a run is asked to do."""

    display_name: str = ""
    task: str = "distil"
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

    @property
    def has_teacher(self) -> bool:
        """Whether a teacher's answers can be had: from itself, or from a cache."""
        return bool(self.teachers) or self.is_offline

    @property
    def is_offline(self) -> bool:
        """Whether all answers come out of a cache, and no teacher is asked."""
        return self.cache is not None and self.cache.mode == "only"

    def loss_of(self, context: ContextConfig) -> LossConfig:
        """What is minimised on the rows of `context`."""
        return context.loss or self.loss

    @property
    def asks_teacher(self) -> bool:
        """Whether training needs a teacher, to score or to write."""
        return any(context.dataset is None or self.loss_of(context).asks_teacher for context in self.contexts)
