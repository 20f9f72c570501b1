"""Tokens of rows that a CPU writes together, with everything recorded of them: a row can be read as soon as it has ended.

Axes: B sequences, N rows, T places, V vocabulary, Q likeliest ids, R draws.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from stillhouse.student_trainer.train.rollouts.draws_numba import Places
from stillhouse.student_trainer.train.rollouts.token_sampler import (
    Recorded,
    TokenSampler,
    non_finite_logits,
)


class RowBuffer:
    """Draws tokens of rows in any order of places."""

    def __init__(self, sampler: TokenSampler, uniform_2NT: NDArray[np.float64]) -> None:
        """`uniform_2NT` are the numbers in [0, LARGEST_UNIFORM] of each token and of its draws."""
        self._sampler = sampler
        # The last place takes what is drawn for rows that have ended.
        self._uniform_2NT = np.pad(uniform_2NT, ((0, 0), (0, 0), (0, 1)))
        # Memory that no row reaches is never touched.
        _, num_rows, num_places = uniform_2NT.shape
        shape = num_rows, num_places + 1
        self._is_finite_NT = np.empty(shape, np.bool_)
        self._tokens_NT, self._logprobs_NT = np.empty(shape, np.int32), np.empty(shape, np.float32)
        self._likeliest_NTQ = np.empty((*shape, sampler.num_likeliest), np.int32)
        self._draws_NTR = np.empty((*shape, sampler.num_draws), np.int32)
        self._shares_NTR = np.empty((*shape, sampler.num_draws), np.float32)
        self._num_draws_NT = np.zeros(shape, np.int32)

    def draw(self, rows_B: Tensor, places_B: Tensor, logits_BV: Tensor) -> Tensor:
        """Draws the token of each row at its place, int64 [B], as TokenRecorder does."""
        last = self._is_finite_NT.shape[1] - 1
        rows, places = rows_B.numpy(), np.minimum(places_B.numpy(), last)
        support = Places(
            rows, places, self._likeliest_NTQ, self._draws_NTR, self._shares_NTR, self._num_draws_NT
        )
        uniform_2B = np.ascontiguousarray(self._uniform_2NT[:, rows, places])
        drawn = self._sampler.draw_with_support(logits_BV, uniform_2B, support)
        self._is_finite_NT[rows, places] = drawn.is_finite.numpy()
        self._tokens_NT[rows, places] = drawn.tokens.numpy()
        self._logprobs_NT[rows, places] = drawn.logprobs.numpy()
        return drawn.tokens

    def row(self, row: int, count: int) -> Recorded:
        """The first `count` tokens of a row, without columns in which none of them has a draw.

        Raises StillhouseError(NON_FINITE) if one of its logits was not finite.
        """
        if not self._is_finite_NT[row, :count].all():
            raise non_finite_logits()
        num_draws = self._num_draws_NT[row, :count]
        width = int(num_draws.max(initial=0))
        is_drawn = np.arange(width) < num_draws[:, None]
        logprobs = np.zeros((count, width), np.float32)
        np.log(self._shares_NTR[row, :count, :width], out=logprobs, where=is_drawn)
        return Recorded(
            tokens=self._tokens_NT[row, :count].copy(),
            logprobs=self._logprobs_NT[row, :count].copy(),
            likeliest=self._likeliest_NTQ[row, :count].copy(),
            draws=np.where(is_drawn, self._draws_NTR[row, :count, :width], -1),
            draw_logprobs=logprobs,
        )
