"""Log-probability of each text token under the student, fused with a linear output layer and computed in chunks.

A loss that sums tokens before it is computed, as over chunks of text, needs the values of all positions first; so
their logits are recomputed in the backward pass. Axes: N targets, H hidden units, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from stillhouse.student_trainer.train.loss.fused import CPU_CHUNK_LOGITS, GPU_CHUNK_LOGITS, OutputLayer
from stillhouse.student_trainer.train.loss.sparse import widened


def text_logprobs(
    hidden: Float[Tensor, "N H"],
    layer: OutputLayer,
    target_ids: Int64[Tensor, "1 N"],
    *,
    chunk_logits: int | None = None,
) -> Float[Tensor, "1 N"]:
    """Returns log q of each target, natural, at temperature 1, float32 or wider; at most max(`chunk_logits`, V) logits exist at a time."""
    if chunk_logits is None:
        chunk_logits = CPU_CHUNK_LOGITS if hidden.device.type == "cpu" else GPU_CHUNK_LOGITS

    def logits_of(rows: slice) -> Tensor:
        return functional.linear(hidden[rows], layer.weight, layer.bias)

    return _in_chunks(logits_of, target_ids, max(1, chunk_logits // layer.weight.shape[0]))


def text_logprobs_of(
    logits: Float[Tensor, "1 N V"], target_ids: Int64[Tensor, "1 N"], *, chunk_logits: int | None = None
) -> Float[Tensor, "1 N"]:
    """Returns log q of each target from complete logits; float32 log-probabilities of one chunk exist at a time."""
    size = logits.shape[1] if chunk_logits is None else max(1, chunk_logits // logits.shape[-1])
    return _in_chunks(lambda rows: logits[0, rows], target_ids, size)


def _in_chunks(logits_of: Callable[[slice], Tensor], target_ids: Tensor, size: int) -> Tensor:
    def chunk(rows: slice) -> Tensor:
        logits = widened(logits_of(rows))
        ids = target_ids[0, rows].unsqueeze(-1)
        return logits.gather(-1, ids).squeeze(-1) - logits.logsumexp(-1)

    num_targets = target_ids.shape[1]
    if num_targets <= size or not torch.is_grad_enabled():
        parts = [chunk(slice(first, first + size)) for first in range(0, num_targets, size)]
    else:
        parts = [
            cast(
                "Tensor",
                checkpoint(chunk, slice(first, first + size), use_reentrant=False, preserve_rng_state=False),
            )
            for first in range(0, num_targets, size)
        ]
    return torch.cat(parts).unsqueeze(0)
