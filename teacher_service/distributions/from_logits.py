"""Logits to exact distributions in float32, whatever type the model computes in, a few rows of [T, V] at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.distributions.draws import uniforms
from stillhouse.teacher_service.distributions.row_tensors import RowInputs, RowTensors, row_tensors
from stillhouse.teacher_service.engine import DistributionOptions, Int32Array

# Axes: T positions, K kept tokens, V vocabulary, N temperatures, Q queries, R samples, H hidden size.

Float64Array = npt.NDArray[np.float64]

CHUNK_ELEMENTS = 1 << 24
"""Elements of a [chunk, V] block of logits; 64 MiB in float32."""
_PARTS = tuple(each.name for each in fields(RowTensors) if each.name != "finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class RowSpec:
    """Sequence and positions of the rows to report."""

    start: int
    """Position of the token that row 0 predicts."""
    sequence: Int32Array
    """[start + T]: the tokens read and, last, the token that the last row predicts."""
    query_token_ids: Int32Array | None = None
    """[T, Q]: ids to report, -1 where a row has fewer."""

    def inputs(
        self, begin: int, end: int, *, hidden_TH: Tensor, uniforms_TR: Float64Array | None
    ) -> RowInputs:
        """Inputs of rows [begin, end), whose hidden states these are."""
        device, queries = hidden_TH.device, self.query_token_ids
        first = self.start + begin
        return RowInputs(
            targets=_long(self.sequence[first : first + end - begin], device),
            queries=None if queries is None else _long(queries[begin:end], device),
            uniforms=None if uniforms_TR is None else torch.from_numpy(uniforms_TR[begin:end]).to(device),
            hidden_states=hidden_TH,
        )


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
    inputs = spec.inputs(begin, begin + len(logits_TV), hidden_TH=hidden_TH, uniforms_TR=uniforms_TR)
    found = row_tensors(logits_TV, options, inputs)
    require_finite(found.finite, spec.start + begin)
    arrays: dict[str, Any] = {}
    for name in _PARTS:
        part = getattr(found, name)
        arrays[name] = None if part is None else part.detach().cpu().numpy()
    return Distributions(start=spec.start + begin, **arrays)


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


def _long(array: Int32Array, device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(device)
