"""Tokens that a teacher draws from logits [T, V]: independent or stratified, of all tokens or outside the top k."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillhouse.teacher_service.distributions.normalisation import (
    Normalised,
    is_compiled,
    scratch,
    tempered,
)
from stillhouse.teacher_service.engine import DistributionOptions

if TYPE_CHECKING:
    from stillhouse.teacher_service.distributions.from_logits import RowSpec

# Axes: T positions, K kept tokens, V vocabulary, R samples.

Float64Array = npt.NDArray[np.float64]

SAMPLE_BLOCK = 32
"""Ids whose probabilities are summed together when sampling."""


class Samples(NamedTuple):
    """Samples of T rows, and their log-probabilities where they are requested."""

    token_ids: Tensor
    """INT32 [T, R]."""
    logprobs: Tensor | None
    """FLOAT32 [T, R], at temperature 1."""


def samples(logits_TV: Tensor, top: Normalised, uniforms_TR: Tensor, options: DistributionOptions) -> Samples:
    """Samples as `options` say, from rows whose top k are `top`; `uniforms_TR` are FLOAT64."""
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
    logits_TV: Tensor, top: Normalised, numbers_TR: Tensor, temperature: float, *, of_tail: bool
) -> Tensor:
    """Samples [T, R] ids in compiled code; `of_tail` from outside the top k alone."""
    from stillhouse.teacher_service.distributions.draws_numba import ascending_ids
    from stillhouse.teacher_service.distributions.topk_numba import tempered_sums

    excluded_TK = (top.token_ids if of_tail else top.token_ids[:, :0]).int()
    excluded, logits = np.ascontiguousarray(excluded_TK.numpy()), logits_TV.numpy()
    if of_tail and top.sums:
        sums = tempered(logits_TV, top, temperature)
    else:
        others_TV = logits_TV.scatter(-1, excluded_TK.long(), -torch.inf)
        sums = tempered_sums(logits, others_TV.amax(dim=-1).numpy(), excluded, temperature)
    ids = ascending_ids(logits, numbers_TR.numpy(), sums=sums, excluded_TK=excluded, temperature=temperature)
    return torch.from_numpy(ids)


def sampled_ids(logits_TV: Tensor, uniforms_TR: Tensor) -> Tensor:
    """Samples [T, R] ids: the inverse of the cumulative distribution, in vocabulary order, at the given uniforms.

    A block of the vocabulary is located first, so that only block sums and the selected blocks are added up in double
    precision. A row that is not finite gets arbitrary ids.
    """
    num_rows, vocab_size = logits_TV.shape
    width = -(-vocab_size // SAMPLE_BLOCK) * SAMPLE_BLOCK
    exps_TV = scratch("drawn", (num_rows, width), logits_TV.device)
    exps_TV[:, vocab_size:] = 0
    torch.sub(logits_TV, logits_TV.amax(dim=-1, keepdim=True), out=exps_TV[:, :vocab_size]).exp_()
    blocks_TNW = exps_TV.view(num_rows, -1, SAMPLE_BLOCK)
    sums_TN = blocks_TNW.sum(dim=-1).double()
    cumulative_TN = sums_TN.cumsum(dim=-1)
    numbers_TR = _below(uniforms_TR, cumulative_TN[:, -1:])
    block_TR = torch.searchsorted(cumulative_TN, numbers_TR, right=True).clamp_max(sums_TN.shape[1] - 1)
    sum_TR = sums_TN.gather(1, block_TR)
    share_TR = (numbers_TR - cumulative_TN.gather(1, block_TR) + sum_TR).clamp_min(0) / sum_TR
    hit_TRW = (
        blocks_TNW.gather(1, block_TR.unsqueeze(-1).expand(-1, -1, SAMPLE_BLOCK)).double().cumsum(dim=-1)
    )
    within_TR1 = torch.searchsorted(hit_TRW, _below(share_TR.unsqueeze(-1), hit_TRW[..., -1:]), right=True)
    return (block_TR * SAMPLE_BLOCK + within_TR1.squeeze(-1)).clamp_max(vocab_size - 1).int()


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
