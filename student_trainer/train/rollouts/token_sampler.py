"""Draws a token from logits by the inverse CDF, with its log-probability, the likeliest ids and ids of the others.

Axes: B sequences, N positions, V vocabulary, Q likeliest ids, R draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.config.schema import RolloutConfig
from stillhouse.student_trainer.train.rollouts import draws_numba

_BLOCK = 256
"""Ids whose probabilities are summed first: only those of one block need a cumulative sum."""


POINTS_PER_DRAW = 8 / 3
"""Points that the whole distribution would have for each draw that a position may have."""

LARGEST_UNIFORM = 1 - 2.0**-52
"""Largest number that a draw takes: with it the product with any total is less than the total."""


_KEPT_LOGITS = 2**22
"""Logits that wait until their likeliest ids and draws are taken: few large operations take less than many small ones."""


class Drawn(NamedTuple):
    """Tokens of one position of B sequences."""

    tokens: Tensor
    """int64 [B]."""
    logprobs: Tensor
    """float32 [B]: under the sampling distribution."""
    is_finite: Tensor
    """bool [B]: False where a logit is NaN or infinite, and the others mean nothing."""


class Support(NamedTuple):
    """Ids at which N positions are compared."""

    likeliest: Tensor
    """int32 [N, Q]: by falling probability of the model."""
    draws: Tensor
    """int32 [N, R]: distinct ids from outside the likeliest, ascending, drawn by the model's probabilities; behind them -1."""
    draw_logprobs: Tensor
    """float32 [N, R]: log of each id's mean share in the R draws: the probability with which it is drawn, over R; 0 at -1."""


class Recorded(NamedTuple):
    """Everything of N tokens, in the order in which they were drawn, as arrays."""

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    likeliest: NDArray[np.int32]
    draws: NDArray[np.int32]
    draw_logprobs: NDArray[np.float32]

    def at(self, *places: Any) -> Recorded:
        """Copies of the tokens at `places`, one of which is an array."""
        return Recorded(
            tokens=self.tokens[places],
            logprobs=self.logprobs[places],
            likeliest=self.likeliest[places],
            draws=self.draws[places],
            draw_logprobs=self.draw_logprobs[places],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSampler:
    """Temperature and nucleus of a sampling, over the first `num_valid` ids."""

    num_valid: int
    num_likeliest: int
    generation: RolloutConfig
    num_draws: int = 0
    """Most ids that are drawn beside the likeliest."""

    @property
    def least_step(self) -> float:
        """Least probability of the model between two points at which ids are drawn: a position with little of it has few."""
        return 1 / (POINTS_PER_DRAW * max(1, self.num_draws))

    def draw(self, logits_BV: Tensor, uniform_B: Tensor) -> Drawn:
        """Draws a token of each sequence by its number `uniform_B`, float64 in [0, LARGEST_UNIFORM].

        Waits for nothing on the device.
        """
        logits_BV = logits_BV[:, : self.num_valid].float()
        # A sum has no finite value where one of its terms has none.
        is_finite_B = torch.isfinite(logits_BV.sum(-1))
        probs_BV = self._probs(logits_BV)
        tokens_B = _inverse_cdf(probs_BV, uniform_B)
        logprobs_B = probs_BV.gather(-1, tokens_B.unsqueeze(-1)).squeeze(-1).log()
        return Drawn(tokens=tokens_B, logprobs=logprobs_B, is_finite=is_finite_B)

    def draw_with_support(
        self, logits_BV: Tensor, uniform_2B: NDArray[np.float64], places: draws_numba.Places
    ) -> Drawn:
        """As `draw` by the first numbers and `support` by the second, whose parts are filled in at `places`, for logits on a CPU."""
        logits_BV = logits_BV[:, : self.num_valid].float()
        is_finite_B = torch.isfinite(logits_BV.sum(-1))
        probs_BV = logits_BV.softmax(-1)
        if self.generation.temperature == 1 and self.generation.top_p == 1:
            tokens = draws_numba.draw_all(probs_BV.numpy(), uniform_2B, self.least_step, places)
        else:
            draws_numba.take_support(probs_BV.numpy(), uniform_2B[1], self.least_step, places)
            probs_BV = self._probs(logits_BV)
            tokens = draws_numba.draw_tokens(probs_BV.numpy(), uniform_2B[0])
        tokens_B = torch.from_numpy(tokens)
        logprobs_B = probs_BV.gather(-1, tokens_B.unsqueeze(-1)).squeeze(-1).log()
        return Drawn(tokens=tokens_B, logprobs=logprobs_B, is_finite=is_finite_B)

    def _probs(self, logits_BV: Tensor) -> Tensor:
        """Probabilities of the sampling distribution."""
        if self.generation.temperature != 1:
            logits_BV = logits_BV / self.generation.temperature
        if self.generation.top_p < 1:
            logits_BV = _nucleus(logits_BV, self.generation.top_p)
        return logits_BV.softmax(-1)

    def support(self, logits_NV: Tensor, uniform_N: Tensor) -> Support:
        """The likeliest ids of the model, at temperature 1, and draws by such numbers."""
        logits_NV = logits_NV[:, : self.num_valid].float()
        likeliest_NQ = logits_NV.topk(self.num_likeliest, dim=-1).indices.int()
        if self.num_draws:
            draws_NR, logprobs_NR = _systematic(
                logits_NV, likeliest_NQ, uniform_N, self.num_draws, self.least_step
            )
        else:
            draws_NR, logprobs_NR = likeliest_NQ[:, :0], logits_NV[:, :0]
        return Support(likeliest=likeliest_NQ, draws=draws_NR, draw_logprobs=logprobs_NR)


class TokenRecorder:
    """Draws tokens, position by position, and records all of them."""

    def __init__(self, sampler: TokenSampler) -> None:
        self._sampler = sampler
        self._drawn: list[Drawn] = []
        self._supports: list[Support] = []
        self._waiting: list[tuple[Tensor, Tensor]] = []

    @property
    def num_positions(self) -> int:
        """Calls of `draw` so far."""
        return len(self._drawn)

    def draw(self, logits_BV: Tensor, uniform_B: Tensor, uniform_draws_B: Tensor) -> Tensor:
        """Draws a token of each sequence, int64 [B], by numbers in [0, LARGEST_UNIFORM]; the logits must stay as they are."""
        drawn = self._sampler.draw(logits_BV, uniform_B)
        self._drawn.append(drawn)
        self._waiting.append((logits_BV, uniform_draws_B))
        if sum(logits.numel() for logits, _ in self._waiting) >= _KEPT_LOGITS:
            self._take_supports()
        return drawn.tokens

    def recorded(self) -> Recorded:
        """Everything drawn, row by row. Raises StillhouseError(NON_FINITE) if a logit was not finite."""
        self._take_supports()
        if not bool(torch.cat([each.is_finite for each in self._drawn]).all()):
            raise non_finite_logits()
        joined = [
            torch.cat(several).cpu().numpy()
            for parts in (self._drawn, self._supports)
            for several in zip(*parts, strict=True)
        ]
        tokens, logprobs, _, likeliest, draws, draw_logprobs = joined
        return Recorded(tokens.astype(np.int32), logprobs, likeliest, draws, draw_logprobs)

    def _take_supports(self) -> None:
        if self._waiting:
            logits, uniform = (torch.cat(each) for each in zip(*self._waiting, strict=True))
            self._supports.append(self._sampler.support(logits, uniform))
            self._waiting.clear()


def non_finite_logits() -> StillhouseError:
    """The error of a student whose logits are NaN or infinite."""
    return StillhouseError(
        Reason.NON_FINITE,
        "The student's logits are non-finite while it samples. Lower optimizer.learning_rate, or use "
        "optimizer.precision: fp32.",
    )


def _systematic(
    logits_NV: Tensor, likeliest_NQ: Tensor, uniform_N: Tensor, num_draws: int, least_step: float
) -> tuple[Tensor, Tensor]:
    """Draws distinct ids outside `likeliest_NQ`, int32 [N, R], ascending, with the logs of their mean shares in the R draws.

    On the line of the others' probabilities points lie at equal distances, from a place that is drawn once a position; each id under
    a point is drawn. So an id with more probability than the distance is drawn for certain, and any other by its share of it.
    """
    tail_NV = logits_NV.softmax(-1).scatter_(-1, likeliest_NQ.long(), 0.0)
    cumulative_NV = tail_NV.cumsum(-1)
    mass_N1 = cumulative_NV[:, -1:]
    step_N1 = (mass_N1.double() / num_draws).clamp(min=least_step)
    parts_R = torch.arange(num_draws, device=logits_NV.device, dtype=torch.float64)
    points_NR = ((parts_R + uniform_N.unsqueeze(-1)) * step_N1).float()
    is_drawn_NR = (points_NR <= mass_N1) & (mass_N1 > 0)
    # A point that rounding lifts to the end would be behind the last id, as are those of rows with NaN, which mean nothing.
    points_NR = torch.minimum(points_NR, torch.nextafter(mass_N1, torch.zeros_like(mass_N1)))
    draws_NR = torch.searchsorted(cumulative_NV, points_NR, right=True).clamp(max=logits_NV.shape[-1] - 1)
    # The length of the very part of the line that a point fell into, so that rounding biases nothing.
    before_NR = cumulative_NV.gather(-1, (draws_NR - 1).clamp(min=0)).masked_fill(draws_NR == 0, 0.0)
    length_NR = cumulative_NV.gather(-1, draws_NR) - before_NR
    length_NR = torch.where(length_NR > 0, length_NR, tail_NV.gather(-1, draws_NR))
    is_drawn_NR[:, 1:] &= draws_NR[:, 1:] != draws_NR[:, :-1]
    # Those that are drawn first.
    order_NR = (~is_drawn_NR).int().sort(dim=-1, stable=True).indices
    is_drawn_NR = is_drawn_NR.gather(-1, order_NR)
    logprobs_NR = ((length_NR.double() / step_N1).clamp(max=1.0) / num_draws).log().float()
    return (
        draws_NR.gather(-1, order_NR).int().masked_fill(~is_drawn_NR, -1),
        logprobs_NR.gather(-1, order_NR).masked_fill(~is_drawn_NR, 0.0),
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
