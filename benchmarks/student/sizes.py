"""Sizes of a student's step: passed as JSON from the benchmark to the process of each pass."""

from __future__ import annotations

from dataclasses import dataclass

T, K = 512, 64
"""Positions per sequence, and kept tokens per position."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """The student, its batch, and their device."""

    vocabulary: int = 151_936
    sequences: int = 4
    """Sequences of T tokens each."""
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    device: str = "cpu"
    dtype: str = "bfloat16"
    """Type of the student and of the teacher's logits, by torch's name."""

    @property
    def positions(self) -> int:
        """N."""
        return self.sequences * T


DEFAULT = Sizes()
