"""Tokens of rows that a CPU writes together, with everything recorded of them: a row can be read as soon as it has ended.

The next token waits for the one before it alone: a thread of its own takes likeliest ids and other draws meanwhile.
Axes: B sequences, N rows, T places, V vocabulary, Q likeliest ids, R draws.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
from torch import Tensor

from stillhouse.student_trainer.train.rollouts import draws_numba
from stillhouse.student_trainer.train.rollouts.token_sampler import (
    Recorded,
    TokenSampler,
    non_finite_logits,
)

_MAX_WAITING = 4
"""Positions of a batch whose ids and draws may wait, each with its probabilities."""


class RowBuffer:
    """Draws tokens of rows in any order of places; a context manager, which ends its thread."""

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
        self._pool = ThreadPoolExecutor(1, "stillhouse-draws")
        self._waiting: deque[Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)

    def draw(
        self, rows_B: Tensor, places_B: Tensor, logits_BV: Tensor, uniform_B: Tensor, uniform_draws_B: Tensor
    ) -> Tensor:
        """Draws the token of each row at its place, int64 [B], as TokenRecorder does."""
        drawn, probs_BV = self._sampler.draw_with_probs(logits_BV, uniform_B)
        last = self._is_finite_NT.shape[1] - 1
        at = rows_B.numpy(), places_B.clamp(max=last).numpy()
        self._is_finite_NT[at] = drawn.is_finite.numpy()
        self._recorded.tokens[at] = drawn.tokens.numpy()
        self._recorded.logprobs[at] = drawn.logprobs.numpy()
        self._wait(_MAX_WAITING - 1)
        taken = self._pool.submit(self._take_support, at, probs_BV.numpy(), uniform_draws_B.numpy())
        self._waiting.append(taken)
        return drawn.tokens

    def row(self, row: int, count: int) -> Recorded:
        """The first `count` tokens of a row. Raises StillhouseError(NON_FINITE) if one of its logits was not finite."""
        self._wait(0)
        if not self._is_finite_NT[row, :count].all():
            raise non_finite_logits()
        return self._recorded.at(row, np.arange(count))

    def _wait(self, most: int) -> None:
        while len(self._waiting) > most:
            self._waiting.popleft().result()

    def _take_support(self, at: Any, probs_BV: Any, uniform_B: Any) -> None:
        likeliest, draws, logprobs = draws_numba.take_support(
            probs_BV, uniform_B, self._sampler.num_likeliest, self._sampler.num_draws
        )
        self._recorded.likeliest[at] = likeliest
        self._recorded.draws[at] = draws
        self._recorded.draw_logprobs[at] = logprobs
