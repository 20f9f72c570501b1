"""Result of one timed pass, and its token ids, which a seed fixes so that two processes read the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Sequences = Sequence[np.ndarray[Any, np.dtype[np.int32]]]
NUM_SPECIAL = 4
"""Ids below it are special tokens, which no sequence contains."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """One pass over some sequences, from the first request to the last array."""

    tokens: int
    """Tokens of the sequences for scoring, generated ones for generation."""
    seconds: float
    num_bytes: int = 0
    """Bytes of the responses on the wire, without HTTP's framing; 0 where nothing is sent or counted."""

    teacher_cpu_s: float = 0.0
    """Processor seconds of the teacher's processes; 0 where they are not counted."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def bytes_per_token(self) -> float:
        """Response bytes per token."""
        return self.num_bytes / self.tokens

    @property
    def teacher_us_per_token(self) -> float:
        """Processor time of the teacher per token, in microseconds."""
        return 1e6 * self.teacher_cpu_s / self.tokens

    def __add__(self, other: Pass) -> Pass:
        """Sum of two passes."""
        return Pass(
            tokens=self.tokens + other.tokens,
            seconds=self.seconds + other.seconds,
            num_bytes=self.num_bytes + other.num_bytes,
            teacher_cpu_s=self.teacher_cpu_s + other.teacher_cpu_s,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PassInput:
    """Sequences of one pass. Groups of `group_size` share a prefix, of `shared` tokens on average."""

    count: int
    length: int
    vocab_size: int
    seed: int
    group_size: int = 1
    shared: int = 0
    spread: int = 1
    """Number of different prefix lengths: a prefix cache keeps full blocks, and lengths are irregular."""

    def shared_lengths(self) -> list[int]:
        """Shared tokens of each sequence."""
        generator = np.random.default_rng([self.seed, self.spread])
        first = self.shared - self.spread // 2
        groups = generator.integers(first, first + self.spread, -(-self.count // self.group_size))
        return [int(each) for each in np.repeat(groups, self.group_size)[: self.count]]

    def sequences(self) -> list[np.ndarray[Any, np.dtype[np.int32]]]:
        """int32 [length] each; a fresh seed gives prefixes that no cache contains."""
        generator = np.random.default_rng(self.seed)

        def draw(size: int) -> np.ndarray[Any, np.dtype[np.int32]]:
            return generator.integers(NUM_SPECIAL, self.vocab_size, size, dtype=np.int32)

        made = []
        for index, shared in enumerate(self.shared_lengths()):
            if index % self.group_size == 0:
                prefix = draw(shared)
            made.append(np.concatenate([prefix, draw(self.length - shared)]))
        return made
