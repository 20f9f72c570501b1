"""The distributions that a run requests for its dataset: the same from a teacher, from a cache, and for a cache that is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    CAPABILITY_COMPACT_LOGPROBS,
    CAPABILITY_ENTROPY,
    CAPABILITY_HIDDEN_STATES,
    DistributionConfig,
    GetTeacherInfoResponse,
)
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor as TensorMessage
from stillhouse.student_trainer.config.rules.cross_tokenizer import evaluation_top_k
from stillhouse.student_trainer.config.rules.evaluation import teacher_metrics
from stillhouse.student_trainer.config.rules.loss import DRAWN_TARGETS, TAIL_TARGETS, takes_draw_logprobs
from stillhouse.student_trainer.config.schema import LossConfig, RunConfig
from stillhouse.student_trainer.config.settled.layer_pairs import teacher_layers
from stillhouse.student_trainer.config.settled.target_choice import DRAW_LOGPROB_BITS
from stillhouse.student_trainer.config.teacher import TeacherConfig
from stillhouse.student_trainer.train.data.corpus import Corpus
from stillhouse.student_trainer.train.data.encoding import Example
from stillhouse.student_trainer.train.data.prepared.rows import ExampleRows

_LOGPROB_DTYPES = {
    "float16": TensorMessage.DATA_TYPE_FLOAT16,
    "float32": TensorMessage.DATA_TYPE_FLOAT32,
    "compact": TensorMessage.DATA_TYPE_FALLING,
}
"""teachers[].logprob_dtype on the wire."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetRequest:
    """One kind of distributions that a run needs of its teachers."""

    top_k: int
    temperature: float | None = None
    """Temperature whose log-partition is needed; None if none is."""
    num_samples: int = 0
    """Tokens that the teacher samples at each position."""
    seed: int = 0
    """Seed of these samples."""
    sample_tail: bool = False
    """Samples are of the tokens outside top_k, at `sample_temperature`."""
    sample_temperature: float = 1.0
    sampled_logprobs: bool = False
    """Samples come with their log-probabilities."""
    stratified: bool = False
    """Samples are stratified, and travel sorted."""
    entropy: bool = False
    field: str = "loss.top_k"
    """Place of `top_k` in the run file."""
    held_out: bool = False
    """Text that is only evaluated on; a cache marks it, so that no run trains on it."""
    hidden_layers: tuple[int, ...] = ()
    """Layers whose states are needed."""
    classes: bool = False
    """The distribution over classes of the whole sequence, and nothing else."""
    class_order: tuple[str, ...] = ()
    """Classes in the order of the results; empty leaves them in the teacher's."""

    def to_config(
        self, teacher: TeacherConfig, info: GetTeacherInfoResponse | None = None
    ) -> DistributionConfig:
        """The request as `teacher` gets it.

        Without the entropy if the service that sent `info` lacks it: then its lower bound weighs the tokens. And with float16
        in the place of compact if it knows none.
        """
        if self.classes:
            return DistributionConfig(
                classes=True,
                hidden_layers=self.hidden_layers,
                logprob_dtype=TensorMessage.DATA_TYPE_FLOAT32,
            )
        last_alone = info is not None and gives_last_state(self.hidden_layers, info)
        dtype = _LOGPROB_DTYPES[teacher.logprob_dtype]
        if (
            dtype == TensorMessage.DATA_TYPE_FALLING
            and info is not None
            and CAPABILITY_COMPACT_LOGPROBS not in info.capabilities
        ):
            dtype = TensorMessage.DATA_TYPE_FLOAT16
        return DistributionConfig(
            top_k=self.top_k,
            logprob_dtype=dtype,
            pack_token_ids=True,
            hidden_states=last_alone,
            hidden_layers=() if last_alone else self.hidden_layers,
            temperatures=[] if self.temperature is None else [self.temperature],
            num_sampled_tokens=self.num_samples,
            seed=self.seed,
            sample_tail=self.sample_tail,
            sample_temperature=self.sample_temperature if self.sample_temperature != 1 else 0,
            sampled_logprobs=self.sampled_logprobs,
            stratified_samples=self.stratified,
            sort_samples=self.stratified,
            sampled_logprob_bits=DRAW_LOGPROB_BITS
            if self.stratified and self.sampled_logprobs and dtype != TensorMessage.DATA_TYPE_FLOAT32
            else 0,
            entropy=self.entropy and (info is None or CAPABILITY_ENTROPY in info.capabilities),
        )

    def select(self, corpus: Corpus, teacher: str) -> Sequence[Example]:
        """The examples of the dataset whose distributions `teacher` gives."""
        examples = corpus.eval if self.held_out else corpus.train
        if isinstance(examples, ExampleRows):
            return examples.of_teachers("", teacher)
        return [each for each in examples if each.teacher in ("", teacher)]


def gives_last_state(layers: Sequence[int], info: GetTeacherInfoResponse) -> bool:
    """True if the last state alone is needed, and the teacher gives that by itself, as some engines do that give no other."""
    return tuple(layers) == (info.num_layers,) and CAPABILITY_HIDDEN_STATES in info.capabilities


def training_request(loss: LossConfig, seed: int, *, field: str = "loss.top_k") -> TargetRequest:
    """The distributions that `loss` needs; `seed` is for samples, where it needs any."""
    tempered = loss.temperature != 1 and loss.temperature_mode == "exact"
    samples, of_tail = loss.sparse_target in DRAWN_TARGETS, loss.sparse_target in TAIL_TARGETS
    stratified = loss.sparse_target == "stratified_tail"
    return TargetRequest(
        top_k=0 if loss.foreign_tokenizer == "alm" else loss.least_top_k,
        hidden_layers=teacher_layers(loss),
        temperature=loss.temperature if tempered else None,
        num_samples=loss.num_samples or 0 if samples else 0,
        seed=seed if samples else 0,
        sample_tail=of_tail,
        sample_temperature=loss.temperature if of_tail else 1.0,
        sampled_logprobs=of_tail and (not stratified or takes_draw_logprobs(loss)),
        stratified=stratified,
        entropy=any(term.weight > 0 and term.token_weighting != "uniform" for term in loss.terms),  # noqa: S105 (of text)
        field=field,
    )


def dataset_request(
    config: RunConfig, loss: LossConfig, *, class_order: Sequence[str] = (), field: str = "loss.top_k"
) -> TargetRequest:
    """The distributions that `loss` needs of the dataset's own rows, by the task of the run."""
    if config.classifies:
        return TargetRequest(
            top_k=0,
            classes=True,
            class_order=tuple(class_order),
            field="task",
            hidden_layers=teacher_layers(loss),
        )
    return training_request(loss, config.data.seed, field=field)


def evaluation_request(config: RunConfig, class_order: Sequence[str] = ()) -> TargetRequest:
    """The distributions of held-out rows: top-k and tail, at temperature 1; or their classes."""
    if config.classifies:
        return TargetRequest(
            top_k=0, classes=True, class_order=tuple(class_order), field="task", held_out=True
        )
    return TargetRequest(top_k=evaluation_top_k(config), field="evaluation.top_k", held_out=True)


def training_requests(config: RunConfig) -> list[TargetRequest]:
    """Requests for the dataset's own completions, one for each loss that trains on them."""
    fields = {
        config.loss_of(context): f"contexts[{number}].loss.top_k" if context.loss else "loss.top_k"
        for number, context in enumerate(config.contexts)
        if context.dataset is not None and config.loss_of(context).asks_teacher
    }
    return [dataset_request(config, loss, field=field) for loss, field in fields.items()]


def evaluation_requests(config: RunConfig, corpus: Corpus) -> list[TargetRequest]:
    """The request for held-out rows, if they are compared with a teacher."""
    compares = corpus.eval and teacher_metrics(config)
    return [evaluation_request(config)] if compares else []
