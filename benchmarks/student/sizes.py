"""What a student's step is measured on: handed from the benchmark to the process of each pass as JSON."""

from __future__ import annotations

from dataclasses import dataclass

T, K = 512, 64
"""Positions of a sequence, and kept tokens of a position."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """A student, its batch, and where both are."""

    vocabulary: int = 151_936
    sequences: int = 4
    """Of T tokens each."""
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    device: str = "cpu"
    dtype: str = "bfloat16"
    """Of the student and of the teacher's logits, by the name that torch has for it."""

    @property
    def positions(self) -> int:
        """N."""
        return self.sequences * T


DEFAULT = Sizes()
