"""Draws a token from logits by the inverse CDF, with its log-probability and the likeliest ids; B sequences, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import RolloutConfig

_BLOCK = 256
"""Ids whose probabilities are summed first: only those of one block need a cumulative sum."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """Tokens of one position of B sequences."""

    tokens: Tensor
    """int64 [B]."""
    logprobs: Tensor
    """float32 [B]: under the sampling distribution."""
    likeliest: Tensor
    """int32 [B, Q]: by falling probability of the model."""

    def __getitem__(self, rows: slice | Tensor) -> Drawn:
        return Drawn(tokens=self.tokens[rows], logprobs=self.logprobs[rows], likeliest=self.likeliest[rows])


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSampler:
    """Temperature and nucleus of a sampling, over the first `num_valid` ids."""

    num_valid: int
    num_likeliest: int
    generation: RolloutConfig

    def draw(self, logits_BV: Tensor, uniform_B: Tensor) -> Drawn:
        """Draws a token of each sequence by its number `uniform_B`, float64 in [0, 1).

        Raises StillhouseError(NON_FINITE) if a logit is not finite.
        """
        logits_BV = logits_BV[:, : self.num_valid].float()
        # A sum has no finite value where one of its terms has none.
        if not bool(torch.isfinite(logits_BV.sum(-1, dtype=torch.float64)).all()):
            raise StillhouseError(
                Reason.NON_FINITE,
                "The student's logits are non-finite while it samples. Lower optimizer.learning_rate, or use "
                "optimizer.precision: fp32.",
            )
        likeliest_BQ = logits_BV.topk(self.num_likeliest, dim=-1).indices.int()
        if self.generation.temperature != 1:
            logits_BV = logits_BV / self.generation.temperature
        if self.generation.top_p < 1:
            logits_BV = _nucleus(logits_BV, self.generation.top_p)
        logprobs_BV = logits_BV.log_softmax(-1)
        tokens_B = _inverse_cdf(logprobs_BV, uniform_B)
        return Drawn(
            tokens=tokens_B,
            logprobs=logprobs_BV.gather(-1, tokens_B.unsqueeze(-1)).squeeze(-1),
            likeliest=likeliest_BQ,
        )


def _inverse_cdf(logprobs_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Samples by the inverse CDF, int64 [B]; never a token of probability 0."""
    probs_BV = logprobs_BV.exp()
    missing = -probs_BV.shape[-1] % _BLOCK
    blocks_BNK = torch.nn.functional.pad(probs_BV, (0, missing)).view(len(probs_BV), -1, _BLOCK)
    masses_BN = blocks_BNK.sum(-1, dtype=torch.float64)
    cumulative_BN = masses_BN.cumsum(-1)
    points_B1 = uniform_B.unsqueeze(-1) * cumulative_BN[:, -1:]
    block_B1 = _first_above(cumulative_BN, points_B1, masses_BN)
    rows_B = torch.arange(len(probs_BV), device=probs_BV.device)
    inside_BK = blocks_BNK[rows_B, block_B1.squeeze(-1)].double()
    before_B1 = (cumulative_BN - masses_BN).gather(-1, block_B1)
    place_B1 = _first_above(inside_BK.cumsum(-1), points_B1 - before_B1, inside_BK)
    return (block_B1 * _BLOCK + place_B1).squeeze(-1)


def _first_above(cumulative_BN: Tensor, points_B1: Tensor, masses_BN: Tensor) -> Tensor:
    """Index of the first cumulative sum above a point, [B, 1]; the last mass above 0 where rounding leaves none."""
    indices_N = torch.arange(masses_BN.shape[-1], device=masses_BN.device)
    last_B1 = torch.where(masses_BN > 0, indices_N, 0).amax(-1, keepdim=True)
    return torch.minimum((cumulative_BN <= points_B1).sum(-1, keepdim=True), last_B1)


def _nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """Keeps the smallest set of most probable tokens with mass >= `top_p`; the others become -inf."""
    sorted_BV, order_BV = logits_BV.sort(descending=True, stable=True)
    probs_BV = sorted_BV.softmax(-1)
    outside_BV = probs_BV.cumsum(-1) - probs_BV >= top_p
    outside_BV[:, 0] = False
    return logits_BV.scatter(-1, order_BV, sorted_BV.masked_fill(outside_BV, -torch.inf))
