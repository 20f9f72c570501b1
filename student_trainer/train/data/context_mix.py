"""Assigns each row of a step to a context: a pure function of seed and step, so that a resumed run mixes as before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stillhouse.student_trainer.train.data.schedule import Schedule

_CONTEXT_STREAM = 3
"""Separates these random numbers from those of the split and of the row order, which have the same seed."""
_TEXT_STREAM = 4
"""Separates the seeds of generated texts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One row of a step."""

    position: int
    """Position in the run's sequence of rows, from 0; unique in the run."""
    row: int
    """Index of the training example."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextMix:
    """Mixture of contexts by weight.

    Each step gives every context its share of rows, rounded up or down so that the mean over steps is exact, at random
    positions in the step.
    """

    weights: Sequence[float]
    schedule: Schedule
    seed: int

    def slots(self, step: int) -> list[list[Slot]]:
        """Returns the rows of `step` by context, each in the order of the schedule."""
        first = step * self.schedule.rows_per_step
        slots = [
            Slot(position=position, row=row)
            for position, row in enumerate(self.schedule.rows(step), start=first)
        ]
        contexts = self._contexts(step, len(slots))
        return [
            [slot for slot, context in zip(slots, contexts, strict=True) if context == wanted]
            for wanted in range(len(self.weights))
        ]

    def _contexts(self, step: int, num_rows: int) -> list[int]:
        if len(self.weights) == 1:
            return [0] * num_rows
        generator = np.random.Generator(np.random.PCG64([self.seed, _CONTEXT_STREAM, step]))
        # Evenly spaced points with one random offset hit each share in proportion, up to rounding.
        points = (np.arange(num_rows) + generator.random()) / num_rows
        edges = np.cumsum(self.weights) / np.sum(self.weights)
        edges[-1] = 1.0
        chosen = np.searchsorted(edges, points, side="right")
        return [int(context) for context in generator.permutation(chosen)]


def text_seed(seed: int, context: int, number: int) -> int:
    """Returns a seed in [0, 2^63) for a generated text; `number` is its position in the run, or its step."""
    state = np.random.SeedSequence([seed, _TEXT_STREAM, context, number]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
