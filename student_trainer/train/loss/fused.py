"""The objective fused with the output layer: chunks of positions, gradients in the forward pass, and never the logits of all.

Every loss is a function of a readout (readout.py): log-probabilities b_s of a few buckets, and t of the text's token.
With h = dL/db, H = sum_s h_s and c = dL/dt, its gradient by a logit z_j at temperature 1 is, by the chain rule,
h_j - q_j (H + c) on a kept token and q_j (h_tail / Q_tail - H - c) on any other, and c more on the text's token. So a
chunk needs its exponentials once, autograd on [C, S] alone, and nothing is computed again in the backward pass.

Axes: N positions, C of a chunk, R of a block, V vocabulary, H hidden units, K kept tokens, S = K + 1 buckets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from stillhouse.student_trainer.config.schema import LossConfig
from stillhouse.student_trainer.train.loss.logit_chunk import LogitChunk
from stillhouse.student_trainer.train.loss.objective import (
    ObjectiveSum,
    TokenFactors,
    objective_of,
    readout_temperature,
    teacher_side,
)
from stillhouse.student_trainer.train.loss.policy_gradient import SampledTokens
from stillhouse.student_trainer.train.loss.readout import Readout, read_out
from stillhouse.student_trainer.train.loss.sparse import Targets, TeacherBuckets
from stillhouse.student_trainer.train.loss.workspace import Workspace

CPU_CHUNK_LOGITS = 2**25
"""Logits that are held at a time on a CPU."""
GPU_CHUNK_LOGITS = 2**28
"""On a GPU a chunk must be large enough to keep it busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputLayer:
    """A plain linear output layer: logits = hidden @ weight.T + bias."""

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Positions:
    """What is known of N positions beside the student: everything has one row of [1, N, ...]."""

    target_ids: Int64[Tensor, "1 N"]
    weights: Float[Tensor, "1 N"]
    """0 where a position does not count."""
    targets: Targets | None
    sampled: SampledTokens | None = None
    token_factors: TokenFactors = field(default_factory=dict)

    def rows(self, rows: slice) -> Positions:
        """The same at some positions."""
        return Positions(
            target_ids=self.target_ids[:, rows],
            weights=self.weights[:, rows],
            targets=None if self.targets is None else self.targets.rows(rows),
            sampled=None if self.sampled is None else self.sampled.rows(rows),
            token_factors={name: factor[:, rows] for name, factor in self.token_factors.items()},
        )


def fused_objective(
    hidden: Float[Tensor, "N H"],
    layer: OutputLayer,
    positions: Positions,
    config: LossConfig,
    *,
    vocab_size: int | None = None,
    chunk_logits: int | None = None,
    workspace: Workspace | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> ObjectiveSum:
    """`objective` of the logits of `layer`, with gradients for `hidden`, the weight and the bias.

    At most `chunk_logits` logits exist at a time, those of one position at least. The product is computed in
    `matmul_dtype`, by default the type of autocast where that is on, else the weight's; what follows in float32 at
    least. Positions of weight 0 add nothing, also where `hidden` is not
    finite there. Whoever calls again and again hands over the same `workspace`.
    """
    if chunk_logits is None:
        chunk_logits = CPU_CHUNK_LOGITS if hidden.device.type == "cpu" else GPU_CHUNK_LOGITS
    work = _Work(
        positions=positions,
        config=config,
        vocab_size=vocab_size,
        chunk_rows=max(1, min(chunk_logits // layer.weight.shape[0], hidden.shape[0])),
        with_gradients=torch.is_grad_enabled(),
        workspace=workspace or Workspace(),
        matmul_dtype=matmul_dtype,
    )
    keep = positions.weights[0] > 0
    if not bool(keep.all()):
        # Zeros, and no gradient: what is not finite must not reach a product.
        hidden = torch.where(keep.unsqueeze(-1), hidden, torch.zeros_like(hidden))
    loss_sum: Tensor = _Fused.apply(hidden, layer.weight, layer.bias, work)  # type: ignore[no-untyped-call]
    return ObjectiveSum(loss_sum=loss_sum, parts=work.parts)


@dataclass(kw_only=True, slots=True)
class _Work:
    """What a fused call is asked, and the metrics that it finds."""

    positions: Positions
    config: LossConfig
    vocab_size: int | None
    chunk_rows: int
    with_gradients: bool
    workspace: Workspace
    matmul_dtype: torch.dtype | None
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class _Fused(torch.autograd.Function):
    """(hidden, weight, bias) -> loss sum; the gradients are ready when the value is."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work) -> Tensor:
        device = hidden.device.type
        native = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        dtype = work.matmul_dtype or native
        wants = [work.with_gradients and wanted for wanted in ctx.needs_input_grad[:3]]
        with torch.autocast(device, enabled=False):
            totals, gradients = _run(hidden.to(dtype), weight, bias, work, wants)
        if gradients.hidden is not None:
            gradients.hidden = gradients.hidden.to(hidden.dtype)
        ctx.gradients = gradients
        work.parts = totals.parts
        return totals.loss_sum

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "a fused objective is differentiated once"
        scaled = [
            None if each is None else each.mul_(upstream[0].to(each.dtype))
            for each in (gradients.hidden, gradients.weight, gradients.bias)
        ]
        return (*scaled, None)


@dataclass(kw_only=True, slots=True)
class _Gradients:
    """Of the loss sum; None where nobody wants one."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def _run(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, work: _Work, wants: list[bool]
) -> tuple[ObjectiveSum, _Gradients]:
    """The sums over all chunks; products are computed in the type of `hidden`."""
    dtype, workspace = hidden.dtype, work.workspace
    gradients = _Gradients(
        hidden=torch.empty_like(hidden) if wants[0] else None,
        weight=None,
        bias=torch.zeros_like(bias) if wants[2] and bias is not None else None,
    )
    # Not kept: it would be held beside what the backward pass needs.
    product_weight = weight.to(dtype)
    weight_sum = _WeightSum(weight, dtype, workspace) if wants[1] else None
    chunk = LogitChunk.allocate(work.chunk_rows, weight.shape[0], dtype, weight.device, workspace)
    parts = []
    for first in range(0, hidden.shape[0], work.chunk_rows):
        rows = slice(first, first + work.chunk_rows)
        hidden_CH = hidden[rows]
        chunk.fill(hidden_CH, product_weight, bias)
        summed, factors = _chunk(chunk, work, rows, differentiate=any(wants))
        parts.append(summed)
        gradient_CV = chunk.logits
        if factors is not None and gradients.bias is not None:
            gradient_CV.mul_(factors)
            factors = None
        if gradients.hidden is not None:
            torch.mm(gradient_CV, product_weight, out=gradients.hidden[rows])
        if factors is not None:
            # A factor of a row is cheaper on [C, H] than on [C, V].
            if gradients.hidden is not None:
                gradients.hidden[rows].mul_(factors)
            hidden_CH = (hidden_CH * factors).to(dtype)
        if weight_sum is not None:
            weight_sum.add(gradient_CV, hidden_CH)
        if gradients.bias is not None:
            gradients.bias.add_(gradient_CV.sum(0, dtype=gradients.bias.dtype))
    if weight_sum is not None:
        del chunk, product_weight
        gradients.weight = weight_sum.total()
    return ObjectiveSum.total(parts), gradients


class _WeightSum:
    """The gradient of a weight [V, H], summed over chunks in the wider of the weight's type and the product's."""

    def __init__(self, weight: Tensor, product_dtype: torch.dtype, workspace: Workspace) -> None:
        self._dtype = weight.dtype
        dtype = torch.promote_types(weight.dtype, product_dtype)
        self._share: Tensor | None = None
        if dtype == weight.dtype:
            # This is handed out.
            self._sum = torch.empty_like(weight)
        else:
            self._sum = workspace.empty("weight sum", weight.shape, dtype, weight.device)
        if dtype != product_dtype:
            # A chunk's share needs a place of its own before it is widened.
            self._share = workspace.empty("weight share", weight.shape, product_dtype, weight.device)
        self._is_empty = True

    def add(self, gradient_CV: Tensor, hidden_CH: Tensor) -> None:
        """Adds the share of a chunk, given the gradient by its logits. The first overwrites what was there."""
        if self._share is None:
            self._sum.addmm_(gradient_CV.T, hidden_CH, beta=0.0 if self._is_empty else 1.0)
        else:
            torch.mm(gradient_CV.T, hidden_CH, out=self._share)
            if self._is_empty:
                self._sum.copy_(self._share)
            else:
                self._sum.add_(self._share)
        self._is_empty = False

    def total(self) -> Tensor:
        """[V, H] in the weight's type."""
        return (self._sum.zero_() if self._is_empty else self._sum).to(self._dtype)


def _chunk(
    chunk: LogitChunk, work: _Work, rows: slice, *, differentiate: bool
) -> tuple[ObjectiveSum, Tensor | None]:
    """The objective of a chunk, whose logits are replaced by their gradient if that is wanted, and the factors [C, 1] of its rows if it has any."""
    here, config = work.positions.rows(rows), work.config
    teacher = teacher_side(
        here.targets, config, num_logits=chunk.logits.shape[-1], vocab_size=work.vocab_size
    )
    temperature = readout_temperature(config)
    if teacher is not None and teacher.token_ids is None:
        return _dense_chunk(chunk, here, teacher, config, differentiate=differentiate), None
    values = chunk.read(here.target_ids, teacher, temperature, differentiate=differentiate)
    leaves = [each.detach().requires_grad_(differentiate) for each in values if each is not None]
    with torch.set_grad_enabled(differentiate):
        readout = Readout(buckets=leaves[0] if teacher is not None else None, targets=leaves[-1])
        summed = _objective(readout, teacher, here, config)
    factors = None
    if differentiate:
        found = torch.autograd.grad(summed.loss_sum, leaves, allow_unused=True, materialize_grads=True)
        factors = chunk.differentiate(found[0] if teacher is not None else None, found[-1])
    return ObjectiveSum(loss_sum=summed.loss_sum.detach(), parts=summed.parts), factors


def _dense_chunk(
    chunk: LogitChunk, here: Positions, teacher: TeacherBuckets, config: LossConfig, *, differentiate: bool
) -> ObjectiveSum:
    """The same where every token is a bucket: the readout is as large as the logits, and autograd does all."""
    logits = chunk.logits.detach().unsqueeze(0).requires_grad_(differentiate)
    with torch.set_grad_enabled(differentiate):
        readout = read_out(
            logits, here.target_ids, here.weights, teacher, temperature=readout_temperature(config)
        )
        summed = _objective(readout, teacher, here, config)
    if differentiate:
        (gradient,) = torch.autograd.grad(summed.loss_sum, logits)
        chunk.logits.copy_(gradient[0])
    return ObjectiveSum(loss_sum=summed.loss_sum.detach(), parts=summed.parts)


def _objective(
    readout: Readout, teacher: TeacherBuckets | None, here: Positions, config: LossConfig
) -> ObjectiveSum:
    return objective_of(
        readout,
        teacher,
        here.targets,
        here.weights,
        config,
        sampled=here.sampled,
        token_factors=here.token_factors,
    )
