"""The objective fused with the output layer: computed in chunks of positions, with gradients in the forward pass.

Every loss is a function of a readout (readout.py): log-probabilities b_s of a few buckets, and t of the text's token.
With h = dL/db, H = sum_s h_s and c = dL/dt, its gradient by a logit z_j at temperature 1 is, by the chain rule,
h_j - q_j (H + c) on a kept token and q_j (h_tail / Q_tail - H - c) on any other, plus c on the text's token. So a
chunk needs its exponentials once, autograd on [C, S] only, and no recomputation in the backward pass.

Axes: N positions, C of a chunk, R of a block, V vocabulary, H hidden units, K kept tokens, S = K + 1 buckets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.student_trainer.config.schema import LossConfig
from stillhouse.student_trainer.train.loss import student_tail
from stillhouse.student_trainer.train.loss.logit_chunk import LogitChunk
from stillhouse.student_trainer.train.loss.objective import (
    ObjectiveSum,
    Positions,
    objective_of,
    readout_temperature,
    teacher_side,
)
from stillhouse.student_trainer.train.loss.products import add_product, multiply
from stillhouse.student_trainer.train.loss.readout import Readout, read_out
from stillhouse.student_trainer.train.loss.sparse import TeacherBuckets
from stillhouse.student_trainer.train.loss.workspace import Workspace

CPU_CHUNK_LOGITS = 2**26
"""Logits held at a time on a CPU."""
CPU_CHUNK_ROWS = 1024
"""Positions of a chunk on a CPU at most: with more, what is computed of their kept tokens leaves the caches, and products gain nothing."""
GPU_CHUNK_LOGITS = 2**28
"""Logits held at a time on a GPU, which small chunks would leave idle."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputLayer:
    """A linear output layer: logits = hidden @ weight.T + bias."""

    weight: Float[Tensor, "V H"]
    bias: Float[Tensor, " V"] | None = None


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
    upstream: float = 1.0,
) -> ObjectiveSum:
    """Computes `objective` from hidden states, with gradients for `hidden`, the weight and the bias.

    At most max(`chunk_logits`, V) logits exist at a time. The matmul runs in `matmul_dtype`, by default autocast's
    dtype if it is on, else the weight's; everything after it in float32 or wider. Positions of weight 0 add nothing,
    even if `hidden` is non-finite there. Repeated calls should pass the same `workspace`. `upstream` is the gradient that
    the backward pass is going to bring, as far as the caller knows it: gradients that have it already are not scaled again.
    """
    most_rows = hidden.shape[0]
    if chunk_logits is None and hidden.device.type == "cpu":
        chunk_logits, most_rows = CPU_CHUNK_LOGITS, min(most_rows, CPU_CHUNK_ROWS)
    elif chunk_logits is None:
        chunk_logits = GPU_CHUNK_LOGITS
    call = _FusedCall(
        positions=positions,
        config=config,
        vocab_size=vocab_size,
        chunk_rows=max(1, min(chunk_logits // layer.weight.shape[0], most_rows)),
        with_gradients=torch.is_grad_enabled(),
        workspace=workspace or Workspace(),
        matmul_dtype=matmul_dtype,
        upstream=upstream,
    )
    keep = positions.weights[0] > 0
    if not bool(keep.all()):
        # Zeroed, without gradient: non-finite values must not reach a matmul.
        hidden = torch.where(keep.unsqueeze(-1), hidden, torch.zeros_like(hidden))
    loss_sum: Tensor = _Fused.apply(hidden, layer.weight, layer.bias, call)  # type: ignore[no-untyped-call]
    return ObjectiveSum(loss_sum=loss_sum, parts=call.parts)


@dataclass(kw_only=True, slots=True)
class _FusedCall:
    """Arguments of a fused call, and the metrics that it returns."""

    positions: Positions
    config: LossConfig
    vocab_size: int | None
    chunk_rows: int
    with_gradients: bool
    workspace: Workspace
    matmul_dtype: torch.dtype | None
    upstream: float
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class _Fused(torch.autograd.Function):
    """(hidden, weight, bias) -> loss sum; gradients are computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: _FusedCall) -> Tensor:
        device = hidden.device.type
        native = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        dtype = call.matmul_dtype or native
        wants = [call.with_gradients and wanted for wanted in ctx.needs_input_grad[:3]]
        if dtype == torch.float16:
            # Its smallest numbers are those of gradients that are not divided yet.
            call.upstream = 1.0
        with torch.autocast(device, enabled=False):
            totals, gradients = _sum_chunks(hidden.to(dtype), weight, bias, call, wants)
        if gradients.hidden is not None:
            gradients.hidden = gradients.hidden.to(hidden.dtype)
        ctx.gradients, ctx.upstream = gradients, call.upstream
        call.parts = totals.parts
        return totals.loss_sum

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "a fused objective is differentiated once"
        found = (gradients.hidden, gradients.weight, gradients.bias)
        known = torch.full_like(upstream[0], ctx.upstream)
        # A look at the value would wait for a device; on a CPU it saves a pass over the weight's gradient.
        if upstream[0].device.type == "cpu" and bool(upstream[0] == known):
            return (*found, None)
        factor = upstream[0] / known
        return (*(None if each is None else each.mul_(factor.to(each.dtype)) for each in found), None)


@dataclass(kw_only=True, slots=True)
class _Gradients:
    """Gradients of the loss sum; None for inputs that need none."""

    hidden: Float[Tensor, "N H"] | None
    weight: Float[Tensor, "V H"] | None
    bias: Float[Tensor, " V"] | None


def _sum_chunks(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    call: _FusedCall,
    wants: list[bool],
) -> tuple[ObjectiveSum, _Gradients]:
    """Sums the objective and its gradients over all chunks; matmuls run in the dtype of `hidden`."""
    dtype, workspace = hidden.dtype, call.workspace
    gradients = _Gradients(
        hidden=torch.empty_like(hidden) if wants[0] else None,
        weight=None,
        bias=torch.zeros_like(bias) if wants[2] and bias is not None else None,
    )
    # Not kept in the context: it would be held in addition to what the backward pass needs.
    matmul_weight = weight.to(dtype)
    weight_sum = _WeightSum(weight, dtype, workspace) if wants[1] else None
    chunk = LogitChunk.allocate(call.chunk_rows, weight.shape[0], dtype, weight.device, workspace)
    parts = []
    for first in range(0, hidden.shape[0], call.chunk_rows):
        rows = slice(first, first + call.chunk_rows)
        hidden_CH = hidden[rows]
        chunk.compute_logits(hidden_CH, matmul_weight, bias)
        summed, row_factors = _chunk_objective(chunk, call, rows, differentiate=any(wants))
        parts.append(summed)
        gradient_CV = chunk.logits
        if row_factors is not None and gradients.bias is not None:
            gradient_CV.mul_(row_factors)
            row_factors = None
        if gradients.hidden is not None:
            multiply(gradient_CV, matmul_weight.T, out=gradients.hidden[rows])
        if row_factors is not None:
            # Row factors are cheaper to apply on [C, H] than on [C, V].
            if gradients.hidden is not None:
                gradients.hidden[rows].mul_(row_factors)
            hidden_CH = (hidden_CH * row_factors).to(dtype)
        if weight_sum is not None:
            weight_sum.add(gradient_CV, hidden_CH)
        if gradients.bias is not None:
            gradients.bias.add_(gradient_CV.sum(0, dtype=gradients.bias.dtype))
    if weight_sum is not None:
        del chunk, matmul_weight
        gradients.weight = weight_sum.total()
    return ObjectiveSum.total(parts), gradients


class _WeightSum:
    """Gradient of a weight [V, H], summed over chunks in the wider of the weight's and the matmul's dtype."""

    def __init__(self, weight: Float[Tensor, "V H"], matmul_dtype: torch.dtype, workspace: Workspace) -> None:
        self._dtype = weight.dtype
        dtype = torch.promote_types(weight.dtype, matmul_dtype)
        self._share: Tensor | None = None
        if dtype == weight.dtype:
            # Handed out by `total`, so it is not workspace memory.
            self._sum = torch.empty_like(weight)
        else:
            self._sum = workspace.empty("weight sum", weight.shape, dtype, weight.device)
        if dtype != matmul_dtype:
            # A chunk's share is computed in its own buffer before it is widened.
            self._share = workspace.empty("weight share", weight.shape, matmul_dtype, weight.device)
        self._is_empty = True

    def add(self, gradient_CV: Float[Tensor, "C V"], hidden_CH: Float[Tensor, "C H"]) -> None:
        """Adds a chunk's share, given the gradient with respect to its logits; the first chunk overwrites the memory."""
        if self._share is None:
            add_product(gradient_CV, hidden_CH, out=self._sum, overwrite=self._is_empty)
        else:
            torch.mm(gradient_CV.T, hidden_CH, out=self._share)
            if self._is_empty:
                self._sum.copy_(self._share)
            else:
                self._sum.add_(self._share)
        self._is_empty = False

    def total(self) -> Float[Tensor, "V H"]:
        """Returns the sum in the weight's dtype."""
        return (self._sum.zero_() if self._is_empty else self._sum).to(self._dtype)


def _chunk_objective(
    chunk: LogitChunk, call: _FusedCall, rows: slice, *, differentiate: bool
) -> tuple[ObjectiveSum, Float[Tensor, "C 1"] | None]:
    """Computes a chunk's objective, replaces its logits by their gradient if wanted, and returns its row factors if any."""
    positions, config = call.positions.rows(rows), call.config
    if differentiate and chunk.threads is not None and student_tail.computes(config, positions.targets):
        return student_tail.differentiate(
            chunk.logits,
            chunk.threads,
            positions,
            config,
            vocab_size=call.vocab_size,
            upstream=call.upstream,
        )
    teacher = teacher_side(
        positions.targets, config, num_logits=chunk.logits.shape[-1], vocab_size=call.vocab_size
    )
    temperature = readout_temperature(config)
    if teacher is not None and teacher.token_ids is None:
        return _dense_chunk_objective(chunk, positions, teacher, call, differentiate=differentiate), None
    values = chunk.read_out(positions.target_ids, teacher, temperature, differentiate=differentiate)
    leaves = [each.detach().requires_grad_(differentiate) for each in values if each is not None]
    with torch.set_grad_enabled(differentiate):
        readout = Readout(buckets=leaves[0] if teacher is not None else None, targets=leaves[-1])
        summed = objective_of(readout, teacher, positions, config)
    row_factors = None
    if differentiate:
        known = torch.full_like(summed.loss_sum, call.upstream)
        grads = torch.autograd.grad(summed.loss_sum, leaves, known, allow_unused=True, materialize_grads=True)
        row_factors = chunk.differentiate(grads[0] if teacher is not None else None, grads[-1])
    return ObjectiveSum(loss_sum=summed.loss_sum.detach(), parts=summed.parts), row_factors


def _dense_chunk_objective(
    chunk: LogitChunk,
    positions: Positions,
    teacher: TeacherBuckets,
    call: _FusedCall,
    *,
    differentiate: bool,
) -> ObjectiveSum:
    """Computes a chunk's objective over dense targets: the readout is as large as the logits, and autograd differentiates it."""
    config = call.config
    logits = chunk.logits.detach().unsqueeze(0).requires_grad_(differentiate)
    with torch.set_grad_enabled(differentiate):
        readout = read_out(
            logits, positions.target_ids, positions.weights, teacher, temperature=readout_temperature(config)
        )
        summed = objective_of(readout, teacher, positions, config)
    if differentiate:
        known = torch.full_like(summed.loss_sum, call.upstream)
        (gradient,) = torch.autograd.grad(summed.loss_sum, logits, known)
        chunk.logits.copy_(gradient[0])
    return ObjectiveSum(loss_sum=summed.loss_sum.detach(), parts=summed.parts)
