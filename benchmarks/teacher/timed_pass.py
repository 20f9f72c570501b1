"""What one timed pass yields, and the token ids that passes are made of: a seed fixes them, so that two processes read the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Sequences = Sequence[np.ndarray[Any, np.dtype[np.int32]]]
NUM_SPECIAL = 4
"""Ids below it end or frame a text, and no sequence has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One pass over some sequences, from the first request to the last array in hand."""

    tokens: int
    """Of the sequences for scoring, written ones for generation."""
    seconds: float
    num_bytes: int = 0
    """Of the answers on the wire, without the framing of HTTP; 0 where nothing is sent or nothing was counted."""

    @property
    def tokens_per_s(self) -> float:
        """The rate."""
        return self.tokens / self.seconds

    @property
    def bytes_per_token(self) -> float:
        """Bytes of the answers for each token."""
        return self.num_bytes / self.tokens

    def __add__(self, other: Pass) -> Pass:
        """Two passes as one."""
        return Pass(
            tokens=self.tokens + other.tokens,
            seconds=self.seconds + other.seconds,
            num_bytes=self.num_bytes + other.num_bytes,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The sequences of one pass. Groups of `group_size` begin with the same tokens, `shared` of them on average."""

    count: int
    length: int
    vocab_size: int
    seed: int
    group_size: int = 1
    shared: int = 0
    spread: int = 1
    """Different numbers of shared tokens that groups have: a prefix cache keeps whole blocks, and no length is the rule."""

    def shared_lengths(self) -> list[int]:
        """Of each sequence: how many tokens it shares with its group."""
        generator = np.random.default_rng([self.seed, self.spread])
        first = self.shared - self.spread // 2
        groups = generator.integers(first, first + self.spread, -(-self.count // self.group_size))
        return [int(each) for each in np.repeat(groups, self.group_size)[: self.count]]

    def sequences(self) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
        """int32 [length] each; a seed that was not used before gives prefixes that no cache has seen."""
        generator = np.random.default_rng(self.seed)

        def draw(size: int) -> np.ndarray[Any, np.dtype[np.int32]]:
            return generator.integers(NUM_SPECIAL, self.vocab_size, size, dtype=np.int32)

        made = []
        for index, shared in enumerate(self.shared_lengths()):
            if index % self.group_size == 0:
                prefix = draw(shared)
            made.append(np.concatenate([prefix, draw(self.length - shared)]))
        return made
