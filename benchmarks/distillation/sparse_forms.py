"""Forms of a student's targets, as a service sends them, and the loss that each gives a small model."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.distillation.full_vocabulary import full_gradient_loss, has_full_gradient
from stillhouse.protos.tensors.distributions import (
    Distributions,
    decode_distributions,
    encode_distributions,
    packed_bits,
)
from stillhouse.student_trainer.config.rules.loss import TAIL_TARGETS, takes_draw_logprobs, why_no_tail_draws
from stillhouse.student_trainer.config.schema import LossConfig, LossTermConfig
from stillhouse.student_trainer.config.settled.target_choice import (
    DRAW_LOGPROB_BITS,
    TargetChoice,
    suits_plain_draws,
)
from stillhouse.student_trainer.train.batching.target_forms import TargetForm, target_rows
from stillhouse.student_trainer.train.loss.fused import OutputLayer, fused_objective
from stillhouse.student_trainer.train.loss.objective import Positions
from stillhouse.student_trainer.train.loss.sparse import DenseTargets, SparseTargets
from stillhouse.student_trainer.train.loss.workspace import Workspace
from stillhouse.teacher_service.distributions.draws import samples
from stillhouse.teacher_service.distributions.normalisation import log_partitions, normalised
from stillhouse.teacher_service.distributions.sorted_rows_numba import pack_block
from stillhouse.teacher_service.engine import DistributionOptions

ID_BITS, LOGPROB_BITS = 18, 16
CHUNK_LOGITS = 2**20
"""Logits of a chunk: it takes narrow models the least time."""
Kind = Literal[
    "cross_entropy",
    "full",
    "tail_bucket",
    "sampled",
    "top_k_and_sampled",
    "sampled_tail",
    "stratified_tail",
    "renormalise",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """Form of the training targets."""

    kind: Kind
    top_k: int = 0
    num_samples: int = 0

    @property
    def num_bytes(self) -> float:
        """Bytes of one token's target; its tail and the text's own token take 8 more. NaN where they depend on the text."""
        if self.kind == "stratified_tail":
            return math.nan
        draw_bits = ID_BITS + LOGPROB_BITS if self.kind == "sampled_tail" else ID_BITS
        return (self.top_k * (ID_BITS + LOGPROB_BITS) + self.num_samples * draw_bits) / 8

    def suits(self, loss: LossConfig) -> bool:
        """True if the form goes with the loss."""
        if self.kind in TAIL_TARGETS:
            return not any(why_no_tail_draws(term) for term in loss.terms)
        return self.kind in ("cross_entropy", "full", "tail_bucket") or suits_plain_draws(loss)

    def __str__(self) -> str:
        parts = [
            self.kind,
            f"k={self.top_k}" if self.top_k else "",
            f"n={self.num_samples}" if self.num_samples else "",
        ]
        return " ".join(part for part in parts if part)


CROSS_ENTROPY, FULL = Form(kind="cross_entropy"), Form(kind="full")
FORMS = (
    Form(kind="tail_bucket", top_k=64),
    Form(kind="top_k_and_sampled", top_k=16, num_samples=90),
    Form(kind="sampled_tail", top_k=16, num_samples=48),
    Form(kind="stratified_tail", top_k=16),
)
"""0 draws of stratified_tail are as many as `auto` takes."""


def settled(form: Form, loss: LossConfig, vocabulary: int) -> Form:
    """The form, with as many draws as `auto` takes where it names none."""
    if form.kind != "stratified_tail" or form.num_samples:
        return form
    own = replace(loss, top_k=form.top_k)
    choice = TargetChoice.draws(own, "", form=form.kind, vocab_size=vocabulary)
    return replace(form, num_samples=choice.num_samples)


def summed_loss(
    model: Any,
    batch: Tensor,
    targets: DenseTargets | SparseTargets | None,
    loss: LossConfig,
    workspace: Workspace | None = None,
) -> Tensor:
    """Sum over the tokens of a batch; of dense targets, which `targets_of` has put at the loss's temperature, with gradients alone
    where `full_gradient_loss` knows the loss."""
    if targets is None:
        loss = LossConfig(terms=(LossTermConfig(weight=0.0),), hard_weight=1.0)
    hidden = model.model(input_ids=batch, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    weight = model.lm_head.weight
    if isinstance(targets, DenseTargets) and has_full_gradient(loss):
        return full_gradient_loss(hidden, weight, targets.logprobs[0], loss)
    text = batch[:, 1:].reshape(1, -1)
    positions = Positions(target_ids=text, weights=torch.ones(text.shape), targets=targets)
    return fused_objective(
        hidden,
        OutputLayer(weight=weight),
        positions,
        loss,
        chunk_logits=CHUNK_LOGITS,
        workspace=workspace,
    ).loss_sum


def targets_of(
    logprobs: Tensor,
    form: Form,
    generator: torch.Generator,
    loss: LossConfig,
    num_bytes: list[float] | None = None,
) -> DenseTargets | SparseTargets:
    """Teacher targets of each next token, [N, V], in the given form, as a service sends them; appends their bytes a token."""
    if form.kind == "full":
        if loss.temperature != 1 and has_full_gradient(loss):
            logprobs = (logprobs / loss.temperature).log_softmax(-1)
        return DenseTargets(logprobs=logprobs.unsqueeze(0))
    temperature, vocab_size = loss.temperature, logprobs.shape[1]
    stratified, top = form.kind == "stratified_tail", normalised(logprobs, form.top_k)
    partitions = None if temperature == 1 else log_partitions(logprobs, top, (temperature,))
    drawn = None
    if form.num_samples:
        shape = len(logprobs), 1 if stratified else form.num_samples
        numbers = torch.rand(shape, generator=generator, dtype=torch.float64)
        if stratified:
            numbers = (torch.arange(form.num_samples) + numbers) / form.num_samples
        options = DistributionOptions(
            top_k=form.top_k,
            num_sampled_tokens=form.num_samples,
            sample_tail=form.kind in TAIL_TARGETS,
            sample_temperature=temperature,
            sampled_logprobs=not stratified or takes_draw_logprobs(loss),
            stratified_samples=stratified,
        )
        drawn = samples(logprobs, top, numbers, options)
    answer = Distributions(
        start=1,
        token_ids=top.token_ids.int().numpy(),
        logprobs=top.logprobs.half().float().numpy(),
        target_logprobs=np.zeros(len(logprobs), np.float32),
        log_tail=top.log_tail.numpy(),
        sampled_token_ids=None if drawn is None else drawn.token_ids.numpy(),
        sampled_logprobs=None
        if drawn is None or drawn.logprobs is None
        else (drawn.logprobs if stratified else drawn.logprobs.half().float()).numpy(),
        log_partitions=None if partitions is None else partitions.numpy(),
    )
    if stratified:
        bits = packed_bits(vocab_size)
        message = encode_distributions(
            answer,
            pack_bits=bits,
            sort_bits=bits,
            sampled_logprob_bits=DRAW_LOGPROB_BITS,
            pack_block=pack_block,
        )
        parts = (message.token_ids, message.logprobs, message.sampled_token_ids, message.sampled_logprobs)
        if num_bytes is not None:
            num_bytes.append(sum(len(part.data) for part in parts) / len(logprobs))
        answer = decode_distributions(
            message, vocab_size=vocab_size, max_rows=len(logprobs), max_top_k=form.top_k
        )
    kind = cast("TargetForm", form.kind)
    found = target_rows(answer, np.arange(len(logprobs)), kind, temperature=temperature)
    shares = found.draw_shares
    return SparseTargets(
        token_ids=torch.from_numpy(found.token_ids).long().unsqueeze(0),
        logprobs=torch.from_numpy(found.logprobs).float().unsqueeze(0),
        log_tail=torch.from_numpy(found.log_tail).float().unsqueeze(0),
        log_partition=None if partitions is None else partitions[:, 0].unsqueeze(0),
        draw_shares=None if shares is None else torch.from_numpy(shares).float().unsqueeze(0),
    )
