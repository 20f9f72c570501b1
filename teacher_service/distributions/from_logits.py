"""Logits to exact distributions in float32, whatever type the model computes in, a few rows of [T, V] at a time."""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.engine import DistributionOptions, Float32Array, Int32Array

# Axes: T positions, K kept tokens, V vocabulary, N temperatures, Q queries, R samples, H hidden size.

Float64Array = npt.NDArray[np.float64]

CHUNK_ELEMENTS = 1 << 24
"""Elements of a [chunk, V] block of logits; 64 MiB in float32."""
GROUP_ELEMENTS = 1 << 20
"""Elements of the rows that a CPU normalises together, so that they stay in its cache over several passes."""
FOLDS = 8, 16
"""Layers into which a CPU folds a vocabulary below and above 2^16 ids: see `largest`."""
COMPILED_VOCAB = 2048
"""Smallest vocabulary that repays the seconds of compilation."""
IDS_PER_TOKEN = 16
"""Smallest ratio of vocabulary to top-k at which compiled code is faster."""
SAMPLE_BLOCK = 32
"""Ids whose probabilities are summed together when sampling."""
_SCRATCH = threading.local()


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
        log_partitions=_numpy_or_none(log_partitions(logits_TV, lse_T1, options.temperatures)),
        query_logprobs=None if query_TQ is None else _query_logprobs(logits_TV, lse_T1, query_TQ),
        sampled_token_ids=None if drawn is None else _numpy(drawn.token_ids),
        sampled_logprobs=None if drawn is None else _numpy_or_none(drawn.logprobs),
        entropy=_numpy(entropies(logits_TV, lse_T1)) if options.entropy else None,
        hidden_states=_numpy(hidden_TH.float()) if options.hidden_states else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalised:
    """Top-k and tail mass of T distributions."""

    token_ids: Tensor
    """INT32 or INT64 [T, K], most likely first."""
    logprobs: Tensor
    """FLOAT32 [T, K]."""
    log_tail: Tensor
    """FLOAT32 [T], log-probability outside the top K."""
    lse: Tensor
    """FLOAT64 [T, 1], log-sum-exp: logprob = logit - lse."""
    finite: Tensor
    """BOOL [T]: all logits of the row are finite; otherwise the row's other values are undefined."""


def normalised(logits_TV: Tensor, top_k: int) -> Normalised:
    """Computes the top k of FLOAT32 logits, k at most V, with exact tails.

    The tail is summed separately, relative to its largest term: 1 - sum would lose everything below 6e-8. Log-sum-exp
    combines head and tail.
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
    """True where `topk_numba` applies: contiguous rows on a CPU, with a large enough vocabulary."""
    if logits_TV.device.type != "cpu" or not logits_TV.is_contiguous():
        return False
    vocab_size = logits_TV.shape[1]
    return vocab_size >= COMPILED_VOCAB and top_k >= 1 and vocab_size >= IDS_PER_TOKEN * (top_k + 2)


def _head_and_tail(logits_TV: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes (ids [T, K], logits [T, K], log-sum-exp FLOAT64 [T, 1] of these and of all others) in PyTorch operations."""
    vocab_size = logits_TV.shape[1]
    values_TC, ids_TC = largest(logits_TV, min(top_k + 1, vocab_size))
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
    """Returns an uninitialised FLOAT32 buffer, which this thread's next call with the same name overwrites.

    Fresh memory is slower to get than to compute in.
    """
    buffers: dict[str, Tensor] = _SCRATCH.__dict__
    key, size = f"{name} {device}", math.prod(shape)
    if key not in buffers or buffers[key].numel() < size:
        buffers[key] = torch.empty(size, dtype=torch.float32, device=device)
    return buffers[key][:size].view(shape)


def as_float32(logits_TV: Tensor) -> Tensor:
    """Returns the logits, or a float32 copy in `scratch`."""
    return (
        logits_TV
        if logits_TV.dtype == torch.float32
        else scratch("logits", logits_TV.shape, logits_TV.device).copy_(logits_TV)
    )


def largest(logits_TV: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Returns values and ids of the `top_k` largest, in order.

    On a CPU the vocabulary is folded into stacked layers. Each of the K largest lies in one of the K columns with the
    largest maxima, so only these are compared.
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
        beyond_TK = top.indices - num_layers * top_k  # in the remainder, which fills no layer
        ids_TK = torch.where(beyond_TK < 0, ids_TK, beyond_TK + num_layers * width)
    return top.values, ids_TK


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


def log_partitions(logits_TV: Tensor, lse_T1: Tensor, temperatures: tuple[float, ...]) -> Tensor | None:
    """[T, N]: log sum_v p_v^(1/T_n), None without temperatures."""
    if not temperatures:
        return None
    columns = [((logits_TV - lse_T1) / temperature).logsumexp(dim=-1) for temperature in temperatures]
    return torch.stack(columns, dim=-1)


def _query_logprobs(logits_TV: Tensor, lse_T1: Tensor, query_TQ: Int32Array) -> Float32Array:
    """[T, Q]; -inf for padding (-1)."""
    ids_TQ = _to(query_TQ, logits_TV)
    logprobs_TQ = logits_TV.gather(-1, ids_TQ.clamp_min(0)) - lse_T1
    return _numpy(logprobs_TQ.masked_fill(ids_TQ < 0, -torch.inf))


def entropies(logits_TV: Tensor, lse_T1: Tensor) -> Tensor:
    """[T] in nats."""
    logprobs_TV = logits_TV - lse_T1
    return -(logprobs_TV.exp() * logprobs_TV).sum(dim=-1)


class Samples(NamedTuple):
    """Samples of T rows, and their log-probabilities where they are requested."""

    token_ids: Tensor
    """INT32 [T, R]."""
    logprobs: Tensor | None
    """FLOAT32 [T, R], at temperature 1."""


def samples(
    logits_TV: Tensor, top: Normalised, uniforms_TR: Float64Array, options: DistributionOptions
) -> Samples:
    """Samples as `options` say, from rows whose top k are `top`."""
    of_tail = options.sample_tail and top.token_ids.shape[1] < logits_TV.shape[1]
    if options.stratified_samples and is_compiled(logits_TV, 1):
        ids_TR = _ascending_ids(logits_TV, top, uniforms_TR, options.sample_temperature, of_tail=of_tail)
    else:
        sampled_TV = logits_TV
        if of_tail:
            sampled_TV = scratch("tail", logits_TV.shape, logits_TV.device).copy_(logits_TV)
            sampled_TV.scatter_(-1, top.token_ids.long(), -torch.inf)
        if options.sample_temperature != 1:
            sampled_TV = sampled_TV / options.sample_temperature
        ids_TR = sampled_ids(sampled_TV, uniforms_TR)
    logprobs_TR = None
    if options.sampled_logprobs:
        logprobs_TR = (logits_TV.gather(-1, ids_TR.long()) - top.lse).float()
    return Samples(ids_TR, logprobs_TR)


def _ascending_ids(
    logits_TV: Tensor, top: Normalised, numbers_TR: Float64Array, temperature: float, *, of_tail: bool
) -> Tensor:
    """Samples [T, R] ids in compiled code; `of_tail` from outside the top k alone."""
    from stillhouse.teacher_service.distributions.draws_numba import ascending_ids

    excluded_TK = top.token_ids.int() if of_tail else top.token_ids.int()[:, :0]
    if excluded_TK.shape[1]:
        highest_T = logits_TV.gather(-1, excluded_TK[:, -1:].long()).squeeze(-1)
    else:
        highest_T = logits_TV.amax(dim=-1)
    arrays = {"excluded_TK": excluded_TK.contiguous().numpy(), "highest_T": highest_T.numpy()}
    return torch.from_numpy(ascending_ids(logits_TV.numpy(), numbers_TR, temperature=temperature, **arrays))


def sampled_ids(logits_TV: Tensor, uniforms_TR: Float64Array) -> Tensor:
    """Samples [T, R] ids: the inverse of the cumulative distribution, in vocabulary order, at the given uniforms.

    A block of the vocabulary is located first, so that only block sums and the selected blocks are added up in double
    precision.
    """
    num_rows, vocab_size = logits_TV.shape
    width = -(-vocab_size // SAMPLE_BLOCK) * SAMPLE_BLOCK
    exps_TV = scratch("drawn", (num_rows, width), logits_TV.device)
    exps_TV[:, vocab_size:] = 0
    torch.sub(logits_TV, logits_TV.amax(dim=-1, keepdim=True), out=exps_TV[:, :vocab_size]).exp_()
    blocks_TNW = exps_TV.view(num_rows, -1, SAMPLE_BLOCK)
    sums_TN = blocks_TNW.sum(dim=-1).double()
    cumulative_TN = sums_TN.cumsum(dim=-1)
    numbers_TR = _below(torch.from_numpy(uniforms_TR).to(logits_TV.device), cumulative_TN[:, -1:])
    block_TR = torch.searchsorted(cumulative_TN, numbers_TR, right=True)
    sum_TR = sums_TN.gather(1, block_TR)
    share_TR = (numbers_TR - cumulative_TN.gather(1, block_TR) + sum_TR).clamp_min(0) / sum_TR
    hit_TRW = (
        blocks_TNW.gather(1, block_TR.unsqueeze(-1).expand(-1, -1, SAMPLE_BLOCK)).double().cumsum(dim=-1)
    )
    within_TR1 = torch.searchsorted(hit_TRW, _below(share_TR.unsqueeze(-1), hit_TRW[..., -1:]), right=True)
    return (block_TR * SAMPLE_BLOCK + within_TR1.squeeze(-1)).int()


def _below(shares: Tensor, totals: Tensor) -> Tensor:
    """Scales shares in [0, 1] to the totals, strictly below them: rounding may reach a total, where no token lies."""
    return torch.minimum(shares * totals, torch.nextafter(totals, torch.zeros_like(totals)))


def uniforms(spec: RowSpec, options: DistributionOptions) -> Float64Array | None:
    """[T, R] uniforms in [0, 1), None if no samples are requested.

    Number r of a position is read from SHAKE-128 over the seed and the prefix, so it is independent of other
    requests, of the batch and of the machine. Stratified ones are (r + number 0) / R.
    """
    count = options.num_sampled_tokens
    if count == 0:
        return None
    num_bytes = 8 if options.stratified_samples else 8 * count
    rows = [np.frombuffer(digest, "<u8") for digest in _prefix_digests(spec, options.seed, num_bytes)]
    # The 53 highest bits: the numbers in [0, 1) that doubles represent evenly.
    numbers = (np.stack(rows) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return (np.arange(count) + numbers) / count if options.stratified_samples else numbers


def _prefix_digests(spec: RowSpec, seed: int, num_bytes: int) -> Iterator[bytes]:
    """Yields one digest per row, over the seed and the row's prefix."""
    tokens = np.ascontiguousarray(spec.sequence, "<i4")
    state = hashlib.shake_128(b"stillhouse draws" + seed.to_bytes(8, "little", signed=True))
    state.update(tokens[: spec.start].tobytes())
    for position in range(spec.start, len(tokens)):
        yield state.digest(num_bytes)
        state.update(tokens[position : position + 1].tobytes())


def _to(array: Int32Array, like: Tensor) -> Tensor:
    return torch.from_numpy(array.astype(np.int64)).to(like.device)


def _numpy_or_none(tensor: Tensor | None) -> npt.NDArray[Any] | None:
    return None if tensor is None else _numpy(tensor)


def _numpy(tensor: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array
