"""Tokens of rows that a CPU writes together, with everything recorded of them: a row can be read as soon as it has ended.

Axes: B sequences, N rows, T places, V vocabulary, Q likeliest ids, R draws.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from stillhouse.student_trainer.train.rollouts.token_sampler import (
    Recorded,
    TokenSampler,
    non_finite_logits,
)


class RowBuffer:
    """Draws tokens of rows in any order of places."""

    def __init__(self, sampler: TokenSampler, num_rows: int, num_places: int) -> None:
        self._sampler = sampler
        # The last place takes what is drawn for rows that have ended. Memory that no row reaches is never touched.
        shape = num_rows, num_places + 1
        self._is_finite_NT = np.empty(shape, np.bool_)
        self._recorded = Recorded(
            tokens=np.empty(shape, np.int32),
            logprobs=np.empty(shape, np.float32),
            likeliest=np.empty((*shape, sampler.num_likeliest), np.int32),
            draws=np.empty((*shape, sampler.num_draws), np.int32),
            draw_logprobs=np.empty((*shape, sampler.num_draws), np.float32),
        )

    def draw(
        self, rows_B: Tensor, places_B: Tensor, logits_BV: Tensor, uniform_B: Tensor, uniform_draws_B: Tensor
    ) -> Tensor:
        """Draws the token of each row at its place, int64 [B], as TokenRecorder does."""
        drawn, support = self._sampler.draw_with_support(logits_BV, uniform_B, uniform_draws_B)
        last = self._is_finite_NT.shape[1] - 1
        at = rows_B.numpy(), places_B.clamp(max=last).numpy()
        self._is_finite_NT[at] = drawn.is_finite.numpy()
        values = drawn.tokens.numpy(), drawn.logprobs.numpy(), *support
        for array, value in zip(self._recorded, values, strict=True):
            array[at] = value
        return drawn.tokens

    def row(self, row: int, count: int) -> Recorded:
        """The first `count` tokens of a row. Raises StillhouseError(NON_FINITE) if one of its logits was not finite."""
        if not self._is_finite_NT[row, :count].all():
            raise non_finite_logits()
        return self._recorded.at(row, np.arange(count))
