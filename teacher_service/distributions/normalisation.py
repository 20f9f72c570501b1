"""Normalisation of FLOAT32 logits [T, V]: log-sum-exp, the top k, and the mass of all other tokens."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stillhouse.teacher_service.distributions.topk_numba import Sums

# Axes: T positions, K kept tokens, V vocabulary, N temperatures.

FOLDS = 8, 16
"""Layers into which a CPU folds a vocabulary below and above 2^16 ids: see `largest`."""
COMPILED_VOCAB = 2048
"""Smallest vocabulary that repays the seconds of compilation."""
IDS_PER_TOKEN = 16
"""Smallest ratio of vocabulary to top-k at which compiled code is faster."""
_SCRATCH = threading.local()


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
    sums: dict[float, Sums] = field(default_factory=dict)
    """Exponentials outside the top K by temperature, from compiled code, which fills in 1; see `tempered`."""


def normalised(logits_TV: Tensor, top_k: int) -> Normalised:
    """Computes the top k of FLOAT32 logits, k at most V, with exact tails.

    The tail is summed separately, relative to its largest term: 1 - sum would lose everything below 6e-8. Log-sum-exp
    combines head and tail.
    """
    top_k = min(top_k, logits_TV.shape[1])
    if is_compiled(logits_TV, top_k):
        from stillhouse.teacher_service.distributions.topk_numba import heads_and_tails

        *arrays, at_1 = heads_and_tails(logits_TV.numpy(), top_k)
        sums = {1.0: at_1}
        ids_TK, values_TK, head_T, rest_T = (torch.from_numpy(each) for each in arrays)
        head_T1, rest_T1, lowest_T = head_T.unsqueeze(-1), rest_T.unsqueeze(-1), head_T
    else:
        sums = {}
        ids_TK, values_TK, head_T1, rest_T1 = _head_and_tail(logits_TV, top_k)
        lowest_T = logits_TV.amin(dim=-1)
    lse_T1 = torch.logaddexp(head_T1, rest_T1)
    return Normalised(
        token_ids=ids_TK,
        logprobs=(values_TK - lse_T1).float(),
        log_tail=(rest_T1 - lse_T1).squeeze(-1).float(),
        lse=lse_T1,
        finite=torch.isfinite(lowest_T) & torch.isfinite(lse_T1.squeeze(-1)),
        sums=sums,
    )


def prepare_kernels(vocab_size: int) -> None:
    """Loads the compiled code that rows of a vocabulary need on a CPU, if any, so that the first row does not wait for it."""
    if not torch.cuda.is_available():
        normalised(torch.zeros(1, vocab_size), 1)


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
        with torch.inference_mode(False):  # a tensor of inference mode is of no use outside it
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


def tempered(logits_TV: Tensor, top: Normalised, temperature: float) -> Sums:
    """Exponentials outside the top K at a temperature, for rows that compiled code normalised; summed once."""
    from stillhouse.teacher_service.distributions.topk_numba import tempered_sums

    if temperature not in top.sums:
        excluded_TK, highest_T = top.token_ids.numpy(), top.sums[1.0].highest
        top.sums[temperature] = tempered_sums(logits_TV.numpy(), highest_T, excluded_TK, temperature)
    return top.sums[temperature]


def log_partitions(logits_TV: Tensor, top: Normalised, temperatures: tuple[float, ...]) -> Tensor | None:
    """FLOAT32 [T, N]: log sum_v p_v^(1/T_n), None without temperatures."""
    if not temperatures:
        return None
    if not top.sums:
        lse_T1 = top.lse.float()
        columns = [((logits_TV - lse_T1) / temperature).logsumexp(dim=-1) for temperature in temperatures]
        return torch.stack(columns, dim=-1)
    columns = []
    for temperature in temperatures:
        sums = tempered(logits_TV, top, temperature)
        highest_T = (torch.from_numpy(sums.highest) - top.lse.squeeze(-1)) / temperature
        rest_T = torch.from_numpy(sums.blocks).sum(dim=-1).log() + highest_T
        columns.append(torch.logaddexp((top.logprobs.double() / temperature).logsumexp(dim=-1), rest_T))
    return torch.stack(columns, dim=-1).float()


def entropies(logits_TV: Tensor, lse_T1: Tensor) -> Tensor:
    """[T] in nats."""
    logprobs_TV = logits_TV - lse_T1
    return -(logprobs_TV.exp() * logprobs_TV).sum(dim=-1)
