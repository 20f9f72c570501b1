"""Samples tokens from a batch of logits, each row by its own plan, with log-probabilities under the distribution
sampled from.

A sample is the inverse of the cumulative distribution at a uniform fixed by seed and position, so it is independent
of batch and device. The distributions are those of `sampling.sample_token`: temperature, then top-k, then top-p.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stillhouse.teacher_service.distributions.normalisation import largest, scratch
from stillhouse.teacher_service.distributions.to_device import to_device
from stillhouse.teacher_service.engines.vllm.worker.request_plan import SamplingPlan

# Axes: B rows, V vocabulary, C candidates, N blocks of the vocabulary, W ids of a block.

BLOCK = 128
"""Ids whose probabilities are summed together before one is selected."""
FIRST_CANDIDATES = 1024
"""Number of most likely tokens searched for a nucleus before the complete vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledRows:
    """One token per row."""

    token_ids: Tensor
    """INT64 [B]."""
    logprobs: Tensor
    """FLOAT32 [B], under the distribution sampled from; 0 at temperature 0."""


def sample_rows(logits_BV: Tensor, plans: list[SamplingPlan], positions: list[int]) -> SampledRows:
    """Samples one token per row of FLOAT32 logits; plans share one `num_valid`. `positions` count the tokens
    generated before.

    A row with NaN or infinite logits gets an arbitrary token.
    """
    num_valid = plans[0].num_valid
    valid_BV = logits_BV[:, :num_valid]
    token_ids = torch.zeros(len(plans), dtype=torch.int64, device=logits_BV.device)
    logprobs = torch.zeros(len(plans), dtype=torch.float32, device=logits_BV.device)
    kinds: dict[str, list[int]] = {}
    for row, plan in enumerate(plans):
        kinds.setdefault(_kind(plan), []).append(row)
    for kind, rows in kinds.items():
        rows_B = to_device(np.array(rows), logits_BV.device)
        some_BV = valid_BV if len(rows) == len(plans) else valid_BV.index_select(0, rows_B)
        if kind == "greedy":
            token_ids.index_copy_(0, rows_B, some_BV.argmax(dim=-1))
            continue
        numbers = [_uniform(plans[row].seed, positions[row]) for row in rows]
        numbers_B1 = _column(numbers, logits_BV)
        chosen = [plans[row] for row in rows]
        sampled = (_from_all if kind == "all" else _from_top_k)(some_BV, chosen, numbers_B1)
        if len(rows) == len(plans):
            return sampled
        token_ids.index_copy_(0, rows_B, sampled.token_ids)
        logprobs.index_copy_(0, rows_B, sampled.logprobs)
    return SampledRows(token_ids=token_ids, logprobs=logprobs)


def _kind(plan: SamplingPlan) -> str:
    if plan.temperature == 0:
        return "greedy"
    if plan.top_k:
        return "top-k"
    return "all" if plan.top_p >= 1 else "nucleus"


def _column(numbers: list[float], like: Tensor) -> Tensor:
    """FLOAT64 [B, 1] on the device of `like`."""
    return to_device(np.array(numbers, np.float64), like.device).unsqueeze(-1)


def _uniform(seed: int, position: int) -> float:
    """Uniform in [0, 1) from the 53 highest bits of a hash."""
    data = seed.to_bytes(8, "little") + position.to_bytes(8, "little")
    digest = hashlib.blake2b(data, digest_size=8, person=b"stillhouse draw").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _from_all(logits_BV: Tensor, plans: list[SamplingPlan], numbers_B1: Tensor) -> SampledRows:
    """Samples from the complete distribution: first a block of the vocabulary, then an id of it."""
    num_rows, num_valid = logits_BV.shape
    highest_B1, temperature_B1, exps_BV = _exponentials(logits_BV, plans)
    exps_BNW = exps_BV.view(num_rows, -1, BLOCK)
    blocks_BN = exps_BNW.sum(dim=-1).double()
    total_B1 = blocks_BN.sum(dim=-1, keepdim=True)
    cumulative_BN = blocks_BN.cumsum(dim=-1)
    block_B1 = _inverse(cumulative_BN, numbers_B1)
    before_B1 = cumulative_BN.gather(1, block_B1) - blocks_BN.gather(1, block_B1)
    within_BW = (
        exps_BNW.gather(1, block_B1.unsqueeze(-1).expand(-1, -1, BLOCK)).squeeze(1).double().cumsum(dim=-1)
    )
    share_B1 = (numbers_B1 * cumulative_BN[:, -1:] - before_B1).clamp_min(0) / within_BW[:, -1:]
    token_B1 = (block_B1 * BLOCK + _inverse(within_BW, share_B1)).clamp_max(num_valid - 1)
    logprob_B1 = (logits_BV.gather(1, token_B1) - highest_B1).double() / temperature_B1 - total_B1.log()
    return SampledRows(token_ids=token_B1.squeeze(1), logprobs=logprob_B1.squeeze(1).float())


def _exponentials(logits_BV: Tensor, plans: list[SamplingPlan]) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (highest [B, 1], temperatures FLOAT64 [B, 1], exp((logit - highest) / temperature) in `scratch`,
    padded to full blocks)."""
    num_rows, num_valid = logits_BV.shape
    width = -(-num_valid // BLOCK) * BLOCK
    exps_BV = scratch("draws", (num_rows, width), logits_BV.device)
    highest_B1 = logits_BV.amax(dim=-1, keepdim=True)
    temperature_B1 = _column([plan.temperature for plan in plans], logits_BV)
    exps_BV[:, num_valid:] = 0
    valid_BV = exps_BV[:, :num_valid]
    torch.sub(logits_BV, highest_B1, out=valid_BV)
    if any(plan.temperature != 1 for plan in plans):
        valid_BV /= temperature_B1.float()
    valid_BV.exp_()
    return highest_B1, temperature_B1, exps_BV


def _from_top_k(logits_BV: Tensor, plans: list[SamplingPlan], numbers_B1: Tensor) -> SampledRows:
    """Samples from the most likely tokens that top-k and top-p keep; all plans or none have a top-k."""
    num_valid = logits_BV.shape[1]
    highest_B1, temperature_B1, exps_BV = _exponentials(logits_BV, plans)
    all_B1 = exps_BV.sum(dim=-1, keepdim=True).double()
    counts = to_device(np.array([plan.top_k or num_valid for plan in plans]), logits_BV.device).unsqueeze(-1)
    top_p_B1 = _column([plan.top_p for plan in plans], logits_BV)
    few = min(num_valid, max(FIRST_CANDIDATES, *(plan.top_k for plan in plans)))
    # A look at the sums would wait for a device: without a top-k, all tokens are ordered there.
    bounded = plans[0].top_k > 0
    on_cpu = logits_BV.device.type == "cpu"
    for num_candidates in (few, num_valid) if bounded or on_cpu else (num_valid,):
        values_BC, ids_BC = largest(logits_BV.contiguous(), num_candidates)
        weights_BC = ((values_BC - highest_B1).double() / temperature_B1).exp()
        weights_BC.masked_fill_(torch.arange(num_candidates, device=logits_BV.device) >= counts, 0)
        sums_BC = weights_BC.cumsum(dim=-1)
        norm_B1 = sums_BC[:, -1:] if bounded else all_B1
        if bounded or (on_cpu and bool((sums_BC[:, -1:] >= top_p_B1 * norm_B1).all())):
            break
    outside_BC = sums_BC - weights_BC >= top_p_B1 * norm_B1
    outside_BC[:, 0] = False
    kept_BC = weights_BC.masked_fill(outside_BC & (top_p_B1 < 1), 0)
    cumulative_BC = kept_BC.cumsum(dim=-1)
    column_B1 = _inverse(cumulative_BC, numbers_B1)
    logprob_B1 = kept_BC.gather(1, column_B1).log() - cumulative_BC[:, -1:].log()
    return SampledRows(
        token_ids=ids_BC.gather(1, column_B1).squeeze(1), logprobs=logprob_B1.squeeze(1).float()
    )


def _inverse(cumulative_BC: Tensor, shares_B1: Tensor) -> Tensor:
    """[B, 1]: first column whose cumulative weight exceeds the share of the total; its own weight is not 0."""
    total_B1 = cumulative_BC[:, -1:]
    # Rounding may lift a number to the total itself, beyond which no column lies.
    numbers_B1 = torch.minimum(shares_B1 * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    found_B1 = torch.searchsorted(cumulative_BC, numbers_B1, right=True)
    return found_B1.clamp_max(cumulative_BC.shape[1] - 1)
