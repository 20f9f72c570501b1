"""Logits to distributions: exact, in float32 whatever the model computes in, a few rows of the vocabulary at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protos.errors import Reason, StillhouseError
from protos.tensor_codec import Distributions
from teacher_service.engine import DistributionOptions, Float32Array, Int32Array

# Axes: T positions, K kept tokens, V vocabulary, N temperatures, Q queries, R draws, H hidden size.

Float64Array = npt.NDArray[np.float64]

CHUNK_ELEMENTS = 1 << 24
"""Elements of a [chunk, V] block; 64 MiB in float32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """The rows that a distribution is asked for."""

    start: int
    """Position of the token that row 0 predicts."""
    sequence: Int32Array
    """[start + T]: everything that is read and, last, the token that the last row predicts."""
    query_token_ids: Int32Array | None = None
    """[T, Q]: ids to report, -1 where a row has fewer."""


def distributions(
    hidden_TH: Tensor,
    head: Callable[[Tensor], Tensor],
    target: Target,
    options: DistributionOptions,
    *,
    vocab_size: int,
) -> Distributions:
    """What `head(hidden_TH)`, the logits of T rows, says about `target`.

    `head` is called on a few rows at a time, so that [T, V] never exists. Raises `StillhouseError` with NON_FINITE
    if a logit is not a finite number. Log-probabilities are natural and normalised over all `vocab_size` rows.
    """
    chunk = max(1, CHUNK_ELEMENTS // vocab_size)
    draws_TR = uniforms(target, options)
    parts = [
        _rows(head(rows_TH), rows_TH, begin=index * chunk, target=target, options=options, draws_TR=draws_TR)
        for index, rows_TH in enumerate(torch.split(hidden_TH, chunk))
    ]
    return parts[0] if len(parts) == 1 else Distributions.concat(parts)


def _rows(
    logits_TV: Tensor,
    hidden_TH: Tensor,
    *,
    begin: int,
    target: Target,
    options: DistributionOptions,
    draws_TR: Float64Array | None,
) -> Distributions:
    logits_TV = logits_TV.float()
    num_rows, vocab_size = logits_TV.shape
    first = target.start + begin
    require_finite(logits_TV, first)
    lse_T1 = logits_TV.logsumexp(dim=-1, keepdim=True)
    top_TK = logits_TV.topk(min(options.top_k, vocab_size), dim=-1)
    target_T1 = _to(target.sequence[first : first + num_rows], logits_TV).unsqueeze(-1)
    # A tail computed as 1 - sum would lose everything below 6e-8.
    rest_TV = logits_TV.scatter(-1, top_TK.indices, -torch.inf)
    log_tail_T = rest_TV.logsumexp(dim=-1) - lse_T1.squeeze(-1)
    query_TQ = None if target.query_token_ids is None else target.query_token_ids[begin : begin + num_rows]
    return Distributions(
        start=first,
        token_ids=_numpy(top_TK.indices.int()),
        logprobs=_numpy(top_TK.values - lse_T1),
        target_logprobs=_numpy((logits_TV.gather(-1, target_T1) - lse_T1).squeeze(-1)),
        log_tail=_numpy(log_tail_T),
        log_partitions=_log_partitions(logits_TV, lse_T1, options.temperatures),
        query_logprobs=None if query_TQ is None else _query_logprobs(logits_TV, lse_T1, query_TQ),
        sampled_token_ids=None if draws_TR is None else _drawn(logits_TV, draws_TR[begin : begin + num_rows]),
        entropy=_entropy(logits_TV, lse_T1) if options.entropy else None,
        hidden_states=_numpy(hidden_TH.float()) if options.hidden_states else None,
    )


def require_finite(logits_TV: Tensor, first: int) -> None:
    """Raises `StillhouseError` with NON_FINITE if a row, counted from position `first`, has NaN or infinity."""
    finite_T = torch.isfinite(logits_TV).all(dim=-1)
    if bool(finite_T.all()):
        return
    position = first + int((~finite_T).nonzero()[0])
    raise StillhouseError(
        Reason.NON_FINITE,
        f"The model's logits for position {position} are not finite numbers. "
        "Its weights are damaged, or its numbers overflow: try --dtype float32.",
        metadata={"position": str(position)},
    )


def _log_partitions(
    logits_TV: Tensor, lse_T1: Tensor, temperatures: tuple[float, ...]
) -> Float32Array | None:
    """[T, N]: log sum_v p_v^(1/T_n)."""
    if not temperatures:
        return None
    columns = [((logits_TV - lse_T1) / temperature).logsumexp(dim=-1) for temperature in temperatures]
    return _numpy(torch.stack(columns, dim=-1))


def _query_logprobs(logits_TV: Tensor, lse_T1: Tensor, query_TQ: Int32Array) -> Float32Array:
    """[T, Q]; -inf where the caller padded with -1."""
    ids_TQ = _to(query_TQ, logits_TV)
    logprobs_TQ = logits_TV.gather(-1, ids_TQ.clamp_min(0)) - lse_T1
    return _numpy(logprobs_TQ.masked_fill(ids_TQ < 0, -torch.inf))


def _entropy(logits_TV: Tensor, lse_T1: Tensor) -> Float32Array:
    """[T] in nats."""
    logprobs_TV = logits_TV - lse_T1
    return _numpy(-(logprobs_TV.exp() * logprobs_TV).sum(dim=-1))


def _drawn(logits_TV: Tensor, draws_TR: Float64Array) -> Int32Array:
    """[T, R]: the inverse of the cumulative distribution, in the order of the vocabulary, at the given numbers."""
    cumulative_TV = logits_TV.double().softmax(dim=-1).cumsum(dim=-1)
    total_T1 = cumulative_TV[:, -1:]
    numbers_TR = torch.from_numpy(draws_TR).to(logits_TV.device) * total_T1
    # Rounding may lift a number to the total itself, beyond which there is no token.
    numbers_TR = torch.minimum(numbers_TR, torch.nextafter(total_T1, torch.zeros_like(total_T1)))
    return _numpy(torch.searchsorted(cumulative_TV, numbers_TR, right=True).int())


def uniforms(target: Target, options: DistributionOptions) -> Float64Array | None:
    """[T, R] numbers in [0, 1), or None if no draws are asked for.

    Number r of a position is read from SHAKE-128 over the seed and the tokens before the position, so it does not
    depend on what else is asked, on the batch, or on the machine.
    """
    if options.num_sampled_tokens == 0:
        return None
    num_bytes = 8 * options.num_sampled_tokens
    rows = [np.frombuffer(digest, "<u8") for digest in _prefix_digests(target, options.seed, num_bytes)]
    # The 53 highest bits are exactly the numbers that a double in [0, 1) can hold evenly.
    return (np.stack(rows) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _prefix_digests(target: Target, seed: int, num_bytes: int) -> Iterator[bytes]:
    """One digest for each row, over the seed and the tokens that the row has read."""
    tokens = np.ascontiguousarray(target.sequence, "<i4")
    state = hashlib.shake_128(b"stillhouse draws" + seed.to_bytes(8, "little", signed=True))
    state.update(tokens[: target.start].tobytes())
    for position in range(target.start, len(tokens)):
        yield state.digest(num_bytes)
        state.update(tokens[position : position + 1].tobytes())


def _to(array: Int32Array, like: Tensor) -> Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(like.device)


def _numpy(tensor: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array
