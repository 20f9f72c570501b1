"""Draws a token from logits by the inverse CDF, with its log-probability and the likeliest ids; B sequences, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import RolloutConfig

_BLOCK = 256
"""Ids whose probabilities are summed first: only those of one block need a cumulative sum."""


LARGEST_UNIFORM = 1 - 2.0**-52
"""Largest number that a draw takes: with it the product with any total is less than the total."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """Tokens of one position of B sequences."""

    tokens: Tensor
    """int64 [B]."""
    logprobs: Tensor
    """float32 [B]: under the sampling distribution."""
    likeliest: Tensor
    """int32 [B, Q]: by falling probability of the model."""
    is_finite: Tensor
    """bool [B]: False where a logit is NaN or infinite, and the others mean nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSampler:
    """Temperature and nucleus of a sampling, over the first `num_valid` ids."""

    num_valid: int
    num_likeliest: int
    generation: RolloutConfig

    def draw(self, logits_BV: Tensor, uniform_B: Tensor) -> Drawn:
        """Draws a token of each sequence by its number `uniform_B`, float64 in [0, LARGEST_UNIFORM].

        Waits for nothing on the device; `require_finite` is for the end.
        """
        logits_BV = logits_BV[:, : self.num_valid].float()
        # A sum has no finite value where one of its terms has none.
        is_finite_B = torch.isfinite(logits_BV.sum(-1))
        likeliest_BQ = logits_BV.topk(self.num_likeliest, dim=-1).indices.int()
        if self.generation.temperature != 1:
            logits_BV = logits_BV / self.generation.temperature
        if self.generation.top_p < 1:
            logits_BV = _nucleus(logits_BV, self.generation.top_p)
        probs_BV = logits_BV.softmax(-1)
        tokens_B = _inverse_cdf(probs_BV, uniform_B)
        return Drawn(
            tokens=tokens_B,
            logprobs=probs_BV.gather(-1, tokens_B.unsqueeze(-1)).squeeze(-1).log(),
            likeliest=likeliest_BQ,
            is_finite=is_finite_B,
        )


def require_finite(drawn: Sequence[Drawn]) -> None:
    """Raises StillhouseError(NON_FINITE) if a logit was not finite."""
    if drawn and not bool(torch.cat([each.is_finite for each in drawn]).all()):
        raise StillhouseError(
            Reason.NON_FINITE,
            "The student's logits are non-finite while it samples. Lower optimizer.learning_rate, or use "
            "optimizer.precision: fp32.",
        )


def _inverse_cdf(probs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Samples by the inverse CDF, int64 [B]; never a token of probability 0. Ids of rows with NaN mean nothing."""
    missing = -probs_BV.shape[-1] % _BLOCK
    if missing:
        probs_BV = torch.nn.functional.pad(probs_BV, (0, missing))
    blocks_BNK = probs_BV.view(len(probs_BV), -1, _BLOCK)
    masses_BN = blocks_BNK.sum(-1, dtype=torch.float64)
    cumulative_BN = masses_BN.cumsum(-1)
    points_B1 = uniform_B.unsqueeze(-1) * cumulative_BN[:, -1:]
    block_B1 = _first_above(cumulative_BN, points_B1)
    inside_BK = blocks_BNK.gather(1, block_B1.unsqueeze(-1).expand(-1, -1, _BLOCK)).squeeze(1)
    inside_BK = inside_BK.cumsum(-1, dtype=torch.float64)
    before_B1 = (cumulative_BN - masses_BN).gather(-1, block_B1)
    # Rounding may leave the point just outside the block.
    left_B1 = torch.minimum((points_B1 - before_B1).clamp_(min=0), inside_BK[:, -1:] * LARGEST_UNIFORM)
    return (block_B1 * _BLOCK + _first_above(inside_BK, left_B1)).squeeze(-1)


def _first_above(cumulative_BN: Tensor, points_B1: Tensor) -> Tensor:
    """Index of the first cumulative sum above a point that is less than the last one, [B, 1]; its own share is above 0."""
    return (cumulative_BN <= points_B1).sum(-1, keepdim=True)


def _nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of most probable tokens with mass >= `top_p`; the others become -inf."""
    sorted_BV, order_BV = logits_BV.sort(descending=True, stable=True)
    probs_BV = sorted_BV.softmax(-1)
    outside_BV = probs_BV.cumsum(-1) - probs_BV >= top_p
    outside_BV[:, 0] = False
    return logits_BV.scatter(-1, order_BV, sorted_BV.masked_fill(outside_BV, -torch.inf))
