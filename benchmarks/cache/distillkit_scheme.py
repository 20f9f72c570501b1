"""DistillKit's compression of top-k logprobs, from its description: restored values and bytes.

Source: github.com/arcee-ai/DistillKit at a61c2e7 (14 March 2026), README.md "Logit Compression" and
distillkit/compression/{config,monotonic_logprobs,bitpack}.py. Logprobs in falling order; the first `exact` ones in
bfloat16; through the others a least-squares curve over t = 0, 1, 2, ... with the given terms, its coefficients in
float32; ids packed to ceil(log2 V) bits. No residuals and no deltas, as in both configurations that its README names.
The tail is not stored: it is 1 less their sum, at least 1e-8 per token (densify.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.tensors.layout import packed_bits

LEAST_PROBABILITY = 1e-8
_SINGULAR_VALUES_ABOVE = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Scheme:
    """One configuration."""

    top_k: int
    exact: int
    """Logprobs stored in bfloat16."""
    powers: tuple[int, ...]
    """Powers of t, beside the square root of t."""

    def bytes_per_token(self, vocab_size: int) -> float:
        """Bytes by its own formula, without the overhead of its files."""
        ids = (self.top_k * packed_bits(vocab_size) + 7) // 8
        return ids + 2 * self.exact + 4 * (len(self.powers) + 1)

    def restored(self, logprobs_TK: NDArray[np.float32]) -> NDArray[np.float32]:
        """Restored logprobs [T, K], in falling order."""
        t = np.arange(self.top_k - self.exact, dtype=np.float32)
        terms = np.stack([*(t**power for power in self.powers), np.sqrt(t)], axis=1)
        u, s, vh = np.linalg.svd(terms, full_matrices=False)
        inverse = np.where(s > _SINGULAR_VALUES_ABOVE, 1 / np.maximum(s, _SINGULAR_VALUES_ABOVE), 0)
        curved = logprobs_TK[:, self.exact :]
        coefficients = (curved @ u * inverse @ vh).astype(np.float32)
        return np.concatenate([bfloat16(logprobs_TK[:, : self.exact]), coefficients @ terms.T], axis=1)

    def log_tail(self, restored_TK: NDArray[np.float32], vocab_size: int) -> NDArray[np.float64]:
        """Log-probability left for all other tokens [T]."""
        left = 1 - np.exp(restored_TK.astype(np.float64)).sum(axis=1)
        log_tail: NDArray[np.float64] = np.log(
            np.maximum(left, LEAST_PROBABILITY * (vocab_size - self.top_k))
        )
        return log_tail


RECOMMENDED = Scheme(top_k=128, exact=16, powers=(0, 1, 2, 3, 4))
BUDGET = Scheme(top_k=50, exact=1, powers=(0, 1))
SCHEMES: Mapping[str, Scheme] = {"DistillKit recommended": RECOMMENDED, "DistillKit budget": BUDGET}


def bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rounds float32 to bfloat16, to nearest, ties to even."""
    words = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16 << 16
    return rounded.astype(np.uint32).view(np.float32).reshape(values.shape)
