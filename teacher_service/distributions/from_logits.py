"""Logits to distributions: exact, in float32 whatever the model computes in, a few rows of the vocabulary at a time."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.engine import DistributionOptions, Float32Array, Int32Array

# Axes: T positions, K kept tokens, V vocabulary, N temperatures, Q queries, R draws, H hidden size.

Float64Array = npt.NDArray[np.float64]

CHUNK_ELEMENTS = 1 << 24
"""Elements of a [chunk, V] block of logits; 64 MiB in float32."""
GROUP_ELEMENTS = 1 << 20
"""Elements of the rows that a CPU normalises at once: what stays in its cache is read several times."""
FOLDS = 8, 16
"""Into how many layers a CPU folds a vocabulary of below and above 2^16 ids to find its likeliest: see `likeliest`."""
COMPILED_VOCAB = 2048
"""Vocabularies from here on are worth the seconds that a process needs for compiled code."""
IDS_PER_TOKEN = 16
"""Ids of a vocabulary for each likeliest that is wanted, from which on the compiled way is the faster one."""
DRAW_BLOCK = 128
"""Ids of the vocabulary whose probabilities are added up before draws look at them."""
_SCRATCH = threading.local()


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
        rows(head(rows_TH), rows_TH, begin=index * chunk, target=target, options=options, draws_TR=draws_TR)
        for index, rows_TH in enumerate(torch.split(hidden_TH, chunk))
    ]
    return parts[0] if len(parts) == 1 else Distributions.concat(parts)


def rows(
    logits_TV: Tensor,
    hidden_TH: Tensor,
    *,
    begin: int,
    target: Target,
    options: DistributionOptions,
    draws_TR: Float64Array | None,
) -> Distributions:
    """What rows [begin, begin + T) of `target` hold, by their logits, of any float type, which stay as they are.

    `draws_TR` are the `uniforms` of the whole target. Raises `StillhouseError` with NON_FINITE.
    """
    size = max(1, GROUP_ELEMENTS // logits_TV.shape[1]) if logits_TV.device.type == "cpu" else len(logits_TV)
    parts = [
        _group(
            logits_TV[row : row + size],
            hidden_TH[row : row + size],
            begin=begin + row,
            target=target,
            options=options,
            draws_TR=draws_TR,
        )
        for row in range(0, len(logits_TV), size)
    ]
    return Distributions.concat(parts)


def _group(
    logits_TV: Tensor,
    hidden_TH: Tensor,
    *,
    begin: int,
    target: Target,
    options: DistributionOptions,
    draws_TR: Float64Array | None,
) -> Distributions:
    logits_TV = as_float32(logits_TV)
    num_rows = len(logits_TV)
    first = target.start + begin
    top = normalised(logits_TV, options.top_k)
    require_finite(top.finite, first)
    lse_T1 = top.lse.float()
    target_T1 = _to(target.sequence[first : first + num_rows], logits_TV).unsqueeze(-1)
    query_TQ = None if target.query_token_ids is None else target.query_token_ids[begin : begin + num_rows]
    return Distributions(
        start=first,
        token_ids=_numpy(top.token_ids.int()),
        logprobs=_numpy(top.logprobs),
        target_logprobs=_numpy((logits_TV.gather(-1, target_T1) - top.lse).squeeze(-1).float()),
        log_tail=_numpy(top.log_tail),
        log_partitions=_numpy_or_none(log_partitions(logits_TV, lse_T1, options.temperatures)),
        query_logprobs=None if query_TQ is None else _query_logprobs(logits_TV, lse_T1, query_TQ),
        sampled_token_ids=None
        if draws_TR is None
        else _numpy(drawn(logits_TV, draws_TR[begin : begin + num_rows])),
        entropy=_numpy(entropies(logits_TV, lse_T1)) if options.entropy else None,
        hidden_states=_numpy(hidden_TH.float()) if options.hidden_states else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalised:
    """The head of T distributions, and what is left of them."""

    token_ids: Tensor
    """INT32 or INT64 [T, K], likeliest first."""
    logprobs: Tensor
    """FLOAT32 [T, K]."""
    log_tail: Tensor
    """FLOAT32 [T], log of the probability outside the K."""
    lse: Tensor
    """FLOAT64 [T, 1]: what turns a logit into a logprob."""
    finite: Tensor
    """BOOL [T]: whether every logit of the row is a number; the row's other values mean nothing where not."""


def normalised(logits_TV: Tensor, top_k: int) -> Normalised:
    """The `top_k` likeliest of FLOAT32 logits, at most V, with exact tails.

    The tail is a sum of its own, relative to the largest in it: taken as 1 - sum, it would lose everything below
    6e-8. Log-sum-exp is made of head and tail.
    """
    top_k = min(top_k, logits_TV.shape[1])
    if is_compiled(logits_TV, top_k):
        from stillhouse.teacher_service.distributions.topk_numba import heads_and_tails

        arrays = heads_and_tails(logits_TV.numpy(), top_k)
        ids_TK, values_TK, head_T, rest_T = (torch.from_numpy(each) for each in arrays)
        head_T1, rest_T1, lowest_T = head_T.unsqueeze(-1), rest_T.unsqueeze(-1), head_T
    else:
        ids_TK, values_TK, head_T1, rest_T1 = _head_and_tail(logits_TV, top_k)
        lowest_T = logits_TV.amin(dim=-1)
    lse_T1 = torch.logaddexp(head_T1, rest_T1)
    return Normalised(
        token_ids=ids_TK,
        logprobs=(values_TK - lse_T1).float(),
        log_tail=(rest_T1 - lse_T1).squeeze(-1).float(),
        lse=lse_T1,
        finite=torch.isfinite(lowest_T) & torch.isfinite(lse_T1.squeeze(-1)),
    )


def is_compiled(logits_TV: Tensor, top_k: int) -> bool:
    """Whether `topk_cpu` serves these logits: on a CPU, rows that lie as it reads them, of a vocabulary large enough."""
    if logits_TV.device.type != "cpu" or not logits_TV.is_contiguous():
        return False
    vocab_size = logits_TV.shape[1]
    return vocab_size >= COMPILED_VOCAB and top_k >= 1 and vocab_size >= IDS_PER_TOKEN * (top_k + 2)


def _head_and_tail(logits_TV: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(ids [T, K], logits [T, K], log-sum-exp FLOAT64 [T, 1] of these, of all others), in PyTorch's operations."""
    vocab_size = logits_TV.shape[1]
    values_TC, ids_TC = likeliest(logits_TV, min(top_k + 1, vocab_size))
    values_TK, ids_TK = values_TC[:, :top_k], ids_TC[:, :top_k]
    first_T1 = values_TC[:, :1].double()
    head_T1 = (values_TK - first_T1).exp_().sum(dim=-1, keepdim=True).log_() + first_T1
    if top_k == vocab_size:
        return ids_TK, values_TK, head_T1, torch.full_like(head_T1, -torch.inf)
    next_T1 = values_TC[:, -1:]
    rest_TV = torch.sub(logits_TV, next_T1, out=scratch("rest", logits_TV.shape, logits_TV.device))
    rest_TV.scatter_(-1, ids_TK, -torch.inf).exp_()
    return ids_TK, values_TK, head_T1, rest_TV.sum(dim=-1, keepdim=True).double().log() + next_T1


def scratch(name: str, shape: torch.Size | tuple[int, int], device: torch.device) -> Tensor:
    """FLOAT32 of this shape and of undefined values, which this thread's next call with this name overwrites.

    Memory that is asked for anew is slower to get than to compute in.
    """
    buffers: dict[str, Tensor] = _SCRATCH.__dict__
    key, size = f"{name} {device}", math.prod(shape)
    if key not in buffers or buffers[key].numel() < size:
        buffers[key] = torch.empty(size, dtype=torch.float32, device=device)
    return buffers[key][:size].view(shape)


def as_float32(logits_TV: Tensor) -> Tensor:
    """The logits themselves, or a copy in `scratch`."""
    return (
        logits_TV
        if logits_TV.dtype == torch.float32
        else scratch("logits", logits_TV.shape, logits_TV.device).copy_(logits_TV)
    )


def likeliest(logits_TV: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the `top_k` largest, in order.

    On a CPU the vocabulary is folded into layers that lie on each other. One of the K largest stands in one of the K
    columns whose own largest are largest: only these are compared.
    """
    num_rows, vocab_size = logits_TV.shape
    if top_k == vocab_size:
        ordered = logits_TV.sort(dim=-1, descending=True)
        return ordered.values, ordered.indices
    num_layers = FOLDS[vocab_size >= 1 << 16]
    width = vocab_size // num_layers
    if logits_TV.device.type != "cpu" or width < 2 * top_k or not logits_TV.is_contiguous():
        top = logits_TV.topk(top_k, dim=-1)
        return top.values, top.indices
    layers_TLW = logits_TV[:, : num_layers * width].view(num_rows, num_layers, width)
    columns_TK = layers_TLW.amax(dim=1).topk(top_k, dim=-1, sorted=False).indices
    candidates_TC = layers_TLW.gather(2, columns_TK.unsqueeze(1).expand(-1, num_layers, -1)).flatten(1)
    if num_layers * width < vocab_size:
        candidates_TC = torch.cat([candidates_TC, logits_TV[:, num_layers * width :]], dim=1)
    top = candidates_TC.topk(top_k, dim=-1)
    layers_TK = top.indices.div(top_k, rounding_mode="floor")
    ids_TK = columns_TK.gather(1, top.indices - layers_TK * top_k) + layers_TK * width
    if num_layers * width < vocab_size:
        beyond_TK = top.indices - num_layers * top_k  # of the rest, which fills no layer
        ids_TK = torch.where(beyond_TK < 0, ids_TK, beyond_TK + num_layers * width)
    return top.values, ids_TK


def require_finite(finite_T: Tensor, first: int) -> None:
    """Raises `StillhouseError` with NON_FINITE for the first row that is not, counted from position `first`."""
    if not bool(finite_T.all()):
        raise non_finite(first + int((~finite_T).nonzero()[0]))


def non_finite(position: int) -> StillhouseError:
    """What is said of a sequence whose logits for `position` are not all numbers."""
    return StillhouseError(
        Reason.NON_FINITE,
        f"The model's logits for position {position} are not finite numbers. "
        "Its weights are damaged, or its numbers overflow: try --dtype float32.",
        metadata={"position": str(position)},
    )


def log_partitions(logits_TV: Tensor, lse_T1: Tensor, temperatures: tuple[float, ...]) -> Tensor | None:
    """[T, N]: log sum_v p_v^(1/T_n), None without temperatures."""
    if not temperatures:
        return None
    columns = [((logits_TV - lse_T1) / temperature).logsumexp(dim=-1) for temperature in temperatures]
    return torch.stack(columns, dim=-1)


def _query_logprobs(logits_TV: Tensor, lse_T1: Tensor, query_TQ: Int32Array) -> Float32Array:
    """[T, Q]; -inf where the caller padded with -1."""
    ids_TQ = _to(query_TQ, logits_TV)
    logprobs_TQ = logits_TV.gather(-1, ids_TQ.clamp_min(0)) - lse_T1
    return _numpy(logprobs_TQ.masked_fill(ids_TQ < 0, -torch.inf))


def entropies(logits_TV: Tensor, lse_T1: Tensor) -> Tensor:
    """[T] in nats."""
    logprobs_TV = logits_TV - lse_T1
    return -(logprobs_TV.exp() * logprobs_TV).sum(dim=-1)


def drawn(logits_TV: Tensor, draws_TR: Float64Array) -> Tensor:
    """[T, R]: the inverse of the cumulative distribution, in the order of the vocabulary, at the given numbers.

    A number finds its block of the vocabulary first, so that only the sums of blocks and the blocks that are hit are
    added up in double precision.
    """
    num_rows, vocab_size = logits_TV.shape
    width = -(-vocab_size // DRAW_BLOCK) * DRAW_BLOCK
    exps_TV = scratch("drawn", (num_rows, width), logits_TV.device)
    exps_TV[:, vocab_size:] = 0
    torch.sub(logits_TV, logits_TV.amax(dim=-1, keepdim=True), out=exps_TV[:, :vocab_size]).exp_()
    blocks_TNW = exps_TV.view(num_rows, -1, DRAW_BLOCK)
    sums_TN = blocks_TNW.sum(dim=-1).double()
    cumulative_TN = sums_TN.cumsum(dim=-1)
    numbers_TR = _below(torch.from_numpy(draws_TR).to(logits_TV.device), cumulative_TN[:, -1:])
    block_TR = torch.searchsorted(cumulative_TN, numbers_TR, right=True)
    sum_TR = sums_TN.gather(1, block_TR)
    share_TR = (numbers_TR - cumulative_TN.gather(1, block_TR) + sum_TR).clamp_min(0) / sum_TR
    hit_TRW = blocks_TNW.gather(1, block_TR.unsqueeze(-1).expand(-1, -1, DRAW_BLOCK)).double().cumsum(dim=-1)
    within_TR1 = torch.searchsorted(hit_TRW, _below(share_TR.unsqueeze(-1), hit_TRW[..., -1:]), right=True)
    return (block_TR * DRAW_BLOCK + within_TR1.squeeze(-1)).int()


def _below(shares: Tensor, totals: Tensor) -> Tensor:
    """Shares in [0, 1] of the totals; rounding may lift one to the total itself, beyond which there is no token."""
    return torch.minimum(shares * totals, torch.nextafter(totals, torch.zeros_like(totals)))


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


def _numpy_or_none(tensor: Tensor | None) -> npt.NDArray[Any] | None:
    return None if tensor is None else _numpy(tensor)


def _numpy(tensor: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array
