"""Probability outside the top K, from the log-probabilities inside."""

from __future__ import annotations

from typing import Any

import numpy as np


def log_tail(logprobs_TK: np.ndarray[tuple[int, ...], np.dtype[np.float32]], vocab_size: int) -> Any:
    """FLOAT32 [T]: log-probability outside the top K; -inf where nothing is.

    Computed by difference, uncertain by about 1e-7 from float32 logprobs. Clipped at its upper bound, V - K tokens as
    probable as the last of the top K.
    """
    num_rows, top_k = logprobs_TK.shape
    if top_k >= vocab_size:
        return np.full(num_rows, -np.inf, dtype=np.float32)
    if top_k == 0:
        return np.zeros(num_rows, dtype=np.float32)
    probs_TK = np.exp(logprobs_TK.astype(np.float64))
    tail_T = np.clip(1.0 - probs_TK.sum(axis=1), 0.0, (vocab_size - top_k) * probs_TK[:, -1])
    with np.errstate(divide="ignore"):
        return np.log(tail_T).astype(np.float32)
