"""Cuts the rows of an update into forward passes: by tokens, so that little is computed for padding, or by rows.

No cut changes the gradient: losses are sums over tokens that are divided by the denominator of the whole update.
Costs are counted in tokens: those that a pass computes, with more for long attention, and a constant for each pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Packing = Literal["always", "cheaper", "never"]

CPU_PASS_TOKENS = 32
"""Tokens whose computation takes as long on a CPU as the constant part of a pass, mostly to read the weights, where nearly all of
them are in a model's layers."""
GPU_PASS_TOKENS = 1024
"""The same on a GPU, where it is mostly the time to start kernels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """Rows of one forward pass."""

    rows: Sequence[int]
    """Places in the update."""
    packed: bool
    """True if they lie in one row, one after the other; else they are padded to the longest."""

    def computed_tokens(self, lengths: Sequence[int]) -> int:
        """Tokens that the pass computes, padding included; `lengths` are those of the update's rows."""
        own = [lengths[row] for row in self.rows]
        return sum(own) if self.packed else len(own) * max(own)


@dataclass(frozen=True, kw_only=True, slots=True)
class PassCutter:
    """Cuts updates into passes of at most `max_tokens`, padding included, or, without it, of `max_rows` in their order."""

    max_tokens: int | None = None
    """A longer row has a pass of its own."""
    max_rows: int | None = None
    """Rows of a pass at most."""
    packing: Packing = "never"
    pass_tokens: int = CPU_PASS_TOKENS
    """Tokens whose computation takes as long as the constant part of a pass."""
    attention_tokens: float = math.inf
    """Length of a row at which attention costs as much as everything else."""

    def cut(self, lengths: Sequence[int], contexts: Sequence[int] = ()) -> list[Pass]:
        """The passes of rows of these lengths, each of one context: the longest rows of a context first."""
        places: dict[int, list[int]] = {}
        for row, context in enumerate(contexts or [0] * len(lengths)):
            places.setdefault(context, []).append(row)
        return [each for context in sorted(places) for each in self._cut(places[context], lengths)]

    def _cut(self, rows: Sequence[int], lengths: Sequence[int]) -> Iterator[Pass]:
        if self.max_tokens is None:
            size = self.max_rows or len(rows)
            for first in range(0, len(rows), size):
                yield Pass(rows=rows[first : first + size], packed=self.packing == "always")
            return
        ordered = sorted(rows, key=lambda row: -lengths[row])
        begin = 0
        for end, packed in self._ends(np.array([lengths[row] for row in ordered])):
            yield Pass(rows=ordered[begin:end], packed=packed)
            begin = end

    def _ends(self, lengths: NDArray[np.int64]) -> list[tuple[int, bool]]:
        """Ends of the cheapest cut of rows of falling length into neighbours, and if each part is packed."""
        assert self.max_tokens is not None
        sums = np.concatenate([[0], np.cumsum(lengths)])
        widest = min(self.max_tokens // int(lengths[-1]) + 1, self.max_rows or len(lengths))
        best = np.zeros(len(lengths) + 1)
        begin_of, packs = np.zeros(len(lengths) + 1, np.int64), np.zeros(len(lengths) + 1, np.bool_)
        for end in range(1, len(lengths) + 1):
            begins = np.arange(max(0, end - widest), end)
            sizes, longest, totals = end - begins, lengths[begins], sums[end] - sums[begins]
            padded = self._costs(sizes * longest, longest, alone=sizes == 1, allowed=self.packing != "always")
            packed = self._costs(totals, totals, alone=sizes == 1, allowed=self.packing != "never")
            costs = best[begins] + np.minimum(padded, packed) + self.pass_tokens
            at = int(costs.argmin())
            best[end], begin_of[end] = costs[at], begins[at]
            packs[end] = packed[at] < padded[at]
        ends: list[tuple[int, bool]] = []
        end = len(lengths)
        while end > 0:
            ends.append((end, bool(packs[end])))
            end = int(begin_of[end])
        return ends[::-1]

    def _costs(
        self,
        tokens: NDArray[np.int64],
        attended: NDArray[np.int64],
        *,
        alone: NDArray[np.bool_],
        allowed: bool,
    ) -> NDArray[np.float64]:
        """Costs of passes of so many tokens, each of which attends to `attended`; inf where they must not be."""
        assert self.max_tokens is not None
        if not allowed:
            return np.full(len(tokens), np.inf)
        costs = tokens * (1.0 + attended / self.attention_tokens)
        return np.where((tokens <= self.max_tokens) | alone, costs, np.inf)


def deal(lengths: Sequence[int], number: int) -> list[list[int]]:
    """Deals rows to `number` processes so that all have about as many tokens; each one's in their order.

    The longest row comes first, and each goes to the process with the fewest tokens so far, then to that with the fewest rows.
    """
    hands: list[list[int]] = [[] for _ in range(number)]
    tokens = [0] * number
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        least = min(range(number), key=lambda hand: (tokens[hand], len(hands[hand]), hand))
        hands[least].append(row)
        tokens[least] += lengths[row]
    return [sorted(hand) for hand in hands]
