"""The target that `sparse_target: auto` becomes, with its reason: by the run file where it decides, else by what teachers give.

It is settled once. The effective spec then holds it like any other setting, so that every later attempt trains on the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.protos.tensors.layout import MAX_ELEMENTS
from stillhouse.student_trainer.config.rules.contexts import is_ensemble, run_losses
from stillhouse.student_trainer.config.rules.loss import (
    DIVERGENCES,
    MAX_SAMPLES,
    STUDENT_TAIL,
    takes_draw_logprobs,
    why_no_tail_draws,
)
from stillhouse.student_trainer.config.schema import (
    BUCKET_TOP_K,
    OWN_DRAWS,
    ContextConfig,
    LossConfig,
    RunConfig,
)
from stillhouse.student_trainer.config.settled.loss_paths import loss_specs, with_losses

AUTO = "auto"
LEAST_SAMPLES, NAMED_SAMPLES = 48, 50
"""Draws beside a top_k of the user's own that leaves no room for more; and with a named target."""

DRAW_LOGPROB_BITS = 4
"""Bits of the log-probability of a stratified draw where others are float16. They add noise that is small beside that of
draws, in place of which there are half as many draws more than with 8."""
TARGET_BYTES = 272
"""Bytes of a token's target, as many as 64 tokens of a vocabulary of 151,936 take with their log-probabilities."""
MOST_DRAWS = 192
"""Draws of a token of forward KL's without log-probabilities. With a vocabulary of 4,096 they keep 98 % of the gain; the
teacher pays for more."""
CROWDING = 0.8
"""Bits of the sorted ids that texts draw at temperature 1 over those of ids that are spread evenly: frequent ids are small and near
each other. At higher temperatures they are spread nearly evenly."""
LARGE_VOCABULARY = 151_936
MOST_QUERIED_IDS = MAX_ELEMENTS // 8 * 7
"""Ids that a text's positions may query together: a tensor holds them, and leaves room in its message."""
_ID_BITS, _LOGPROB_BITS = 18, 16
"""Bits of an id of a vocabulary of 151,936, and of a log-probability."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetChoice:
    """The settled target of one loss."""

    sparse_target: str
    top_k: int
    num_samples: int
    sparse_target_reason: str
    draw_logprobs: bool | None = None
    """True if stratified draws are requested with their log-probabilities; None for other targets."""

    @classmethod
    def draws(cls, loss: LossConfig, why: str, *, form: str, vocab_size: int) -> TargetChoice:
        """The top-k exactly and draws of target `form` for the rest, in TARGET_BYTES."""
        top_k, token_bits = loss.least_top_k, _ID_BITS + _LOGPROB_BITS
        if form == "stratified_tail":
            room = _stratified_draws(loss, vocab_size)
            if loss.num_samples is not None and loss.num_samples < room:
                why = f"{why}; num_samples is the run file's own, and {room} would be steadier"
        else:
            of_tail = form == "sampled_tail"
            room = (8 * TARGET_BYTES - top_k * token_bits) // (token_bits if of_tail else _ID_BITS)
        return cls(
            sparse_target=form,
            top_k=top_k,
            num_samples=max(room, LEAST_SAMPLES) if loss.num_samples is None else loss.num_samples,
            sparse_target_reason=why,
            draw_logprobs=takes_draw_logprobs(loss) if form == "stratified_tail" else None,
        )

    @classmethod
    def own_draws(
        cls, loss: LossConfig, why: str, *, max_query_tokens: int, max_new_tokens: int
    ) -> TargetChoice | None:
        """The top-k of both sides, and draws of the student, as many as the teacher may be queried for; None if those are few.
        The longest text has `max_new_tokens`."""
        queried = min(max_query_tokens, MOST_QUERIED_IDS // max_new_tokens)
        room = min(OWN_DRAWS, queried - loss.least_top_k)
        if room < min(OWN_DRAWS, LEAST_SAMPLES):
            return None
        if loss.num_samples is None and room < OWN_DRAWS:
            of = "the teacher takes" if queried == max_query_tokens else "so long a text may have"
            why = f"{why}; {room} draws in the place of {OWN_DRAWS}, as {of} {queried} queried ids a position"
        return cls(
            sparse_target=STUDENT_TAIL,
            top_k=loss.least_top_k,
            num_samples=room if loss.num_samples is None else loss.num_samples,
            sparse_target_reason=why,
        )

    @classmethod
    def bucket(cls, loss: LossConfig, why: str, *, max_top_k: int = BUCKET_TOP_K) -> TargetChoice:
        """The top-k, and one bucket for the rest; `max_top_k` is the most that the teacher gives."""
        return cls(
            sparse_target="tail_bucket",
            top_k=min(BUCKET_TOP_K, max_top_k) if loss.top_k is None else loss.top_k,
            num_samples=NAMED_SAMPLES if loss.num_samples is None else loss.num_samples,
            sparse_target_reason=why,
        )

    def to_json(self) -> dict[str, Any]:
        """Its fields that are set, by their names in the run file."""
        every = ((name, getattr(self, name)) for name in self.__slots__)
        return {name: value for name, value in every if value is not None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TargetChoice:
        """The choice that `to_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            sparse_target=str(value["sparse_target"]),
            top_k=int(value["top_k"]),
            num_samples=int(value["num_samples"]),
            sparse_target_reason=str(value["sparse_target_reason"]),
            draw_logprobs=bool(value["draw_logprobs"]) if "draw_logprobs" in value else None,
        )


def has_few_draws(loss: LossConfig) -> bool:
    """True if the target of a settled loss draws less steadily than it should, by its kind or by the run file's own words."""
    if loss.sparse_target == "sampled_tail":
        return True
    least = _stratified_draws(loss, LARGE_VOCABULARY)
    named = loss.sparse_target == "stratified_tail" and not loss.sparse_target_reason
    return named and (loss.num_samples or 0) < least


def was_settled_without_logprobs(loss: LossConfig, vocab_size: int) -> bool:
    """True if a settled loss has as many stratified draws as an earlier version took without log-probabilities."""
    count = _most_draws(loss.least_top_k, vocab_size, limit=MAX_SAMPLES)
    return bool(loss.sparse_target_reason) and loss.num_samples == count


def _stratified_draws(loss: LossConfig, vocab_size: int) -> int:
    """The number of draws that fit beside the top-k, and that a teacher pays for."""
    if takes_draw_logprobs(loss):
        return _most_draws(
            loss.least_top_k,
            vocab_size,
            logprob_bits=DRAW_LOGPROB_BITS,
            limit=MAX_SAMPLES,
        )
    crowding = CROWDING if loss.temperature <= 1 else 1.0
    return _most_draws(loss.least_top_k, vocab_size, limit=MOST_DRAWS, crowding=crowding)


def _most_draws(
    top_k: int,
    vocab_size: int,
    *,
    limit: int,
    logprob_bits: int = 0,
    crowding: float = 1.0,
) -> int:
    """The most draws whose sorted ids fit beside the top-k; `crowding` is what an id takes of what it took if all were spread evenly."""
    id_bits = max(1, (vocab_size - 1).bit_length())
    room = 8 * TARGET_BYTES - top_k * (id_bits + _LOGPROB_BITS)
    if logprob_bits:
        room -= 2 * _LOGPROB_BITS  # bounds of the row

    def bits(count: int) -> float:
        return count * (crowding * (2 + math.log2(max(1.0, vocab_size / count))) + logprob_bits)

    most = min(limit, max(1, vocab_size))
    return next((count for count in range(most, 0, -1) if bits(count) <= room), 0)


def why_no_draws(config: RunConfig, loss: LossConfig) -> str:
    """The reason in the run file that keeps `loss` from targets that the teacher draws; empty if only teachers decide."""
    terms = [term for term in loss.terms if term.weight > 0]
    # An unknown divergence is reported by the checks.
    full = [term for term in terms if term.estimator == "full" and term.divergence in DIVERGENCES]
    if not terms:
        return "no term has a weight, so that no teacher is queried for targets"
    if loss.foreign_tokenizer == "alm":
        return "foreign_tokenizer alm compares the text's own tokens alone"
    if not full:
        return "the policy gradient needs the text's own tokens alone"
    if suits_own_draws(config, loss):
        return ""
    unsuited = next((why for term in full if (why := why_no_tail_draws(term))), "")
    if unsuited:
        return unsuited
    if loss.temperature != 1 and loss.temperature_mode != "exact":
        return f"temperature_mode {loss.temperature_mode} compares the kept tokens alone"
    if is_ensemble(config):
        return "several teachers are mixed, and their draws are not those of the mixture"
    return ""


def contexts_of(config: RunConfig, loss: LossConfig) -> list[ContextConfig]:
    """The contexts that train with `loss`."""
    return [context for context in config.contexts if config.loss_of(context) == loss]


def suits_own_draws(config: RunConfig, loss: LossConfig) -> bool:
    """True if draws of the student give an unbiased estimate: for reverse KL at temperature 1 on nothing but the student's texts."""
    full = [term for term in loss.terms if term.weight > 0 and term.estimator == "full"]
    own = contexts_of(config, loss)
    return (
        bool(full)
        and all(term.divergence == "reverse_kl" for term in full)
        and loss.temperature == 1
        and bool(own)
        and all(context.student is not None for context in own)
    )


def suits_plain_draws(loss: LossConfig) -> bool:
    """True if draws of all tokens, without their log-probabilities, give an unbiased gradient."""
    terms = (term for term in loss.terms if term.weight > 0 and term.estimator == "full")
    return loss.temperature == 1 and all(term.divergence == "forward_kl" for term in terms)


def settle_by_file(config: RunConfig, loss: LossConfig) -> LossConfig:
    """`loss` with the target that the run file alone decides, and the defaults that belong to it; `auto` may remain."""
    if config.classifies:  # its teachers send every class
        return loss
    if loss.sparse_target != AUTO:
        return replace(
            loss,
            top_k=BUCKET_TOP_K if loss.top_k is None else loss.top_k,
            num_samples=NAMED_SAMPLES if loss.num_samples is None else loss.num_samples,
        )
    why = why_no_draws(config, loss)
    return settle(loss, TargetChoice.bucket(loss, why)) if why else loss


def unsettled(config: RunConfig) -> Iterator[tuple[str, LossConfig]]:
    """Losses whose target the teachers, or the cache, still have to decide, with their paths."""
    return ((path, loss) for path, loss in run_losses(config) if loss.sparse_target == AUTO)


def settle(loss: LossConfig, choice: TargetChoice) -> LossConfig:
    """`loss` with its target settled."""
    return replace(loss, **choice.to_json())


def settle_config(config: RunConfig, choices: Mapping[str, TargetChoice]) -> RunConfig:
    """`config` with the losses at the paths of `choices` settled."""
    return with_losses(config, lambda path, loss: settle(loss, choices[path]) if path in choices else loss)


def settle_spec(spec: RunSpec, choices: Mapping[str, TargetChoice]) -> None:
    """Does the same to an effective spec, in place."""
    for path, loss in loss_specs(spec):
        if path in choices:
            for name, value in choices[path].to_json().items():
                setattr(loss, name, value)
