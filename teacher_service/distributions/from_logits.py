"""Logits to exact distributions in float32, whatever type the model computes in, a few rows of [T, V] at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.distributions.draws import samples, uniforms
from stillhouse.teacher_service.distributions.normalisation import (
    as_float32,
    entropies,
    log_partitions,
    normalised,
)
from stillhouse.teacher_service.engine import DistributionOptions, Float32Array, Int32Array

# Axes: T positions, K kept tokens, V vocabulary, N temperatures, Q queries, R samples, H hidden size.

Float64Array = npt.NDArray[np.float64]

CHUNK_ELEMENTS = 1 << 24
"""Elements of a [chunk, V] block of logits; 64 MiB in float32."""
GROUP_ELEMENTS = 1 << 20
"""Elements of the rows that a CPU normalises together, so that they stay in its cache over several passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSpec:
    """Sequence and positions of the rows to report."""

    start: int
    """Position of the token that row 0 predicts."""
    sequence: Int32Array
    """[start + T]: the tokens read and, last, the token that the last row predicts."""
    query_token_ids: Int32Array | None = None
    """[T, Q]: ids to report, -1 where a row has fewer."""


def distributions(
    hidden_TH: Tensor,
    head: Callable[[Tensor], Tensor],
    spec: RowSpec,
    options: DistributionOptions,
    *,
    vocab_size: int,
) -> Distributions:
    """Computes the distributions of T rows from their hidden states and `head`, which maps hidden states to logits.

    `head` is called on a few rows at a time, so that [T, V] never exists. Raises `StillhouseError` with NON_FINITE
    for NaN or infinite logits. Log-probabilities are natural and normalised over all `vocab_size` rows.
    """
    chunk = max(1, CHUNK_ELEMENTS // vocab_size)
    uniforms_TR = uniforms(spec, options)
    parts = [
        rows(head(rows_TH), rows_TH, begin=index * chunk, spec=spec, options=options, uniforms_TR=uniforms_TR)
        for index, rows_TH in enumerate(torch.split(hidden_TH, chunk))
    ]
    return Distributions.concat(parts)


def rows(
    logits_TV: Tensor,
    hidden_TH: Tensor,
    *,
    begin: int,
    spec: RowSpec,
    options: DistributionOptions,
    uniforms_TR: Float64Array | None,
) -> Distributions:
    """Computes rows [begin, begin + T) of `spec` from logits of any float type, which are not modified.

    `uniforms_TR` are the `uniforms` of the complete spec. Raises `StillhouseError` with NON_FINITE.
    """
    size = max(1, GROUP_ELEMENTS // logits_TV.shape[1]) if logits_TV.device.type == "cpu" else len(logits_TV)
    if len(logits_TV) > size:
        parts = [
            rows(
                logits_TV[row : row + size],
                hidden_TH[row : row + size],
                begin=begin + row,
                spec=spec,
                options=options,
                uniforms_TR=uniforms_TR,
            )
            for row in range(0, len(logits_TV), size)
        ]
        return Distributions.concat(parts)
    logits_TV = as_float32(logits_TV)
    num_rows = len(logits_TV)
    first = spec.start + begin
    top = normalised(logits_TV, options.top_k)
    require_finite(top.finite, first)
    lse_T1 = top.lse.float()
    target_T1 = _to(spec.sequence[first : first + num_rows], logits_TV).unsqueeze(-1)
    query_TQ = None if spec.query_token_ids is None else spec.query_token_ids[begin : begin + num_rows]
    drawn = None
    if uniforms_TR is not None:
        drawn = samples(logits_TV, top, uniforms_TR[begin : begin + num_rows], options)
    return Distributions(
        start=first,
        token_ids=_numpy(top.token_ids.int()),
        logprobs=_numpy(top.logprobs),
        target_logprobs=_numpy((logits_TV.gather(-1, target_T1) - top.lse).squeeze(-1).float()),
        log_tail=_numpy(top.log_tail),
        log_partitions=_numpy_or_none(log_partitions(logits_TV, top, options.temperatures)),
        query_logprobs=None if query_TQ is None else _query_logprobs(logits_TV, lse_T1, query_TQ),
        sampled_token_ids=None if drawn is None else _numpy(drawn.token_ids),
        sampled_logprobs=None if drawn is None else _numpy_or_none(drawn.logprobs),
        entropy=_numpy(entropies(logits_TV, lse_T1)) if options.entropy else None,
        hidden_states=_numpy(hidden_TH.float()) if options.hidden_states else None,
    )


def require_finite(finite_T: Tensor, first: int) -> None:
    """Raises `StillhouseError` with NON_FINITE for the first row that is not finite; row 0 is position `first`."""
    if not bool(finite_T.all()):
        raise non_finite(first + int((~finite_T).nonzero()[0]))


def non_finite(position: int) -> StillhouseError:
    """Builds the error for NaN or infinite logits at `position`."""
    return StillhouseError(
        Reason.NON_FINITE,
        f"The model's logits for position {position} are NaN or infinite. "
        "Its weights are damaged, or its activations overflow: try --dtype float32.",
        metadata={"position": str(position)},
    )


def _query_logprobs(logits_TV: Tensor, lse_T1: Tensor, query_TQ: Int32Array) -> Float32Array:
    """[T, Q]; -inf for padding (-1)."""
    ids_TQ = _to(query_TQ, logits_TV)
    logprobs_TQ = logits_TV.gather(-1, ids_TQ.clamp_min(0)) - lse_T1
    return _numpy(logprobs_TQ.masked_fill(ids_TQ < 0, -torch.inf))


def _to(array: Int32Array, like: Tensor) -> Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(like.device)


def _numpy_or_none(tensor: Tensor | None) -> npt.NDArray[Any] | None:
    return None if tensor is None else _numpy(tensor)


def _numpy(tensor: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array
