"""Samples one token from logits, with its log-probability under the distribution sampled from."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_token(
    logits_V: Tensor,
    *,
    temperature: float,
    top_p: float,
    top_k: int,
    num_valid: int,
    generator: torch.Generator,
) -> tuple[int, float]:
    """Returns (token, its log-probability) for one row of logits after temperature, top-k and top-p, in this order.

    Ids from `num_valid` on pad the output layer and are never sampled. Temperature 0 is argmax, with log-probability
    0.
    """
    logits_V = logits_V[:num_valid].float().cpu()
    if temperature == 0:
        return int(logits_V.argmax()), 0.0
    # Differences from the maximum, and a divisor that float32 does not round to 0, keep the maximum finite.
    logits_V = (logits_V - logits_V.max()) / max(temperature, torch.finfo(logits_V.dtype).tiny)
    if 0 < top_k < len(logits_V):
        logits_V = logits_V.masked_fill(~_top_k_mask(logits_V, top_k), -torch.inf)
    if top_p < 1:
        logits_V = _nucleus(logits_V, top_p)
    logprobs_V = logits_V.log_softmax(dim=-1)
    token = int(torch.multinomial(logprobs_V.exp(), 1, generator=generator))
    return token, float(logprobs_V[token])


def _top_k_mask(logits_V: Tensor, count: int) -> Tensor:
    """Mask of exactly `count` tokens, also among ties."""
    mask_V = torch.zeros_like(logits_V, dtype=torch.bool)
    return mask_V.scatter(0, logits_V.topk(count).indices, True)


def _nucleus(logits_V: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of most likely tokens whose probability reaches `top_p`; the others become -inf."""
    sorted_V, order_V = logits_V.sort(descending=True, stable=True)
    probs_V = sorted_V.softmax(dim=-1)
    before_V = probs_V.cumsum(dim=-1) - probs_V
    outside_V = before_V >= top_p
    outside_V[0] = False
    return logits_V.scatter(0, order_V, sorted_V.masked_fill(outside_V, -torch.inf))
