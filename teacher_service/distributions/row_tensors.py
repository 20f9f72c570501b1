"""Logits to rows of distributions as tensors on the model's device, in float32 whatever type the model computes in.

Nothing here waits for the device or reads from it, except on a CPU, where compiled code takes over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from stillhouse.teacher_service.distributions.draws import samples
from stillhouse.teacher_service.distributions.normalisation import (
    as_float32,
    entropies,
    log_partitions,
    normalised,
)
from stillhouse.teacher_service.engine import DistributionOptions

# Axes: T positions, K kept tokens, V vocabulary, N temperatures, Q queries, R samples, H hidden size.

GROUP_ELEMENTS = 1 << 20
"""Elements of the rows that a CPU normalises together, so that they stay in its cache over several passes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowInputs:
    """Parts that the rows report besides what the logits alone decide, on the device of the logits."""

    targets: Tensor
    """INT64 [T]: the token that follows each position."""
    queries: Tensor | None = None
    """INT64 [T, Q]: ids to report, -1 where a row has fewer."""
    uniforms: Tensor | None = None
    """FLOAT64 [T, R] in [0, 1), from which the samples follow."""
    hidden_states: Tensor | None = None
    """[T, H]."""

    def rows(self, begin: int, end: int) -> RowInputs:
        """Returns rows [begin, end)."""
        parts: dict[str, Any] = {}
        for each in fields(self):
            part = getattr(self, each.name)
            parts[each.name] = None if part is None else part[begin:end]
        return RowInputs(**parts)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTensors:
    """T distributions, in the parts of `Distributions`. A row that is not finite holds arbitrary numbers."""

    token_ids: Tensor
    """INT32 [T, K], most likely first."""
    logprobs: Tensor
    """FLOAT32 [T, K]."""
    target_logprobs: Tensor
    """FLOAT32 [T]."""
    log_tail: Tensor
    """FLOAT32 [T]."""
    finite: Tensor
    """BOOL [T]: all logits of the row are finite."""
    log_partitions: Tensor | None
    """FLOAT32 [T, N]."""
    query_logprobs: Tensor | None
    """FLOAT32 [T, Q]; -inf for padding."""
    sampled_token_ids: Tensor | None
    """INT32 [T, R]."""
    sampled_logprobs: Tensor | None
    """FLOAT32 [T, R], at temperature 1."""
    entropy: Tensor | None
    """FLOAT32 [T], nats."""
    hidden_states: Tensor | None
    """FLOAT32 [T, H]."""

    @staticmethod
    def concat(parts: Sequence[RowTensors]) -> RowTensors:
        """Joins rows of the same options."""
        if len(parts) == 1:
            return parts[0]
        joined: dict[str, Any] = {}
        for each in fields(RowTensors):
            column = [getattr(part, each.name) for part in parts]
            joined[each.name] = None if column[0] is None else torch.cat(column)
        return RowTensors(**joined)


def row_tensors(logits_TV: Tensor, options: DistributionOptions, inputs: RowInputs) -> RowTensors:
    """Computes rows from logits of any float type, which are not modified."""
    size = max(1, GROUP_ELEMENTS // logits_TV.shape[1]) if logits_TV.device.type == "cpu" else len(logits_TV)
    if len(logits_TV) > size:
        ends = range(size, len(logits_TV) + size, size)
        return RowTensors.concat(
            [row_tensors(logits_TV[end - size : end], options, inputs.rows(end - size, end)) for end in ends]
        )
    logits_TV = as_float32(logits_TV)
    top = normalised(logits_TV, options.top_k)
    lse_T1 = top.lse.float()
    target_T1 = logits_TV.gather(-1, inputs.targets.unsqueeze(-1)) - top.lse
    drawn = None if inputs.uniforms is None else samples(logits_TV, top, inputs.uniforms, options)
    return RowTensors(
        token_ids=top.token_ids.int(),
        logprobs=top.logprobs,
        target_logprobs=target_T1.squeeze(-1).float(),
        log_tail=top.log_tail,
        finite=top.finite,
        log_partitions=log_partitions(logits_TV, top, options.temperatures),
        query_logprobs=None if inputs.queries is None else _query_logprobs(logits_TV, lse_T1, inputs.queries),
        sampled_token_ids=None if drawn is None else drawn.token_ids,
        sampled_logprobs=None if drawn is None else drawn.logprobs,
        entropy=entropies(logits_TV, lse_T1) if options.entropy else None,
        hidden_states=inputs.hidden_states.float()
        if options.hidden_states and inputs.hidden_states is not None
        else None,
    )


def _query_logprobs(logits_TV: Tensor, lse_T1: Tensor, query_TQ: Tensor) -> Tensor:
    """[T, Q]; -inf for padding (-1)."""
    logprobs_TQ = logits_TV.gather(-1, query_TQ.clamp_min(0)) - lse_T1
    return logprobs_TQ.masked_fill(query_TQ < 0, -torch.inf)
