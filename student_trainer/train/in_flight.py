"""The student's texts between writing and learning: recorded as drawn, with the version of the weights that wrote them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One text of the student as it was drawn."""

    token_ids: NDArray[np.int32]
    """[T]: prompt and text."""
    start: int
    """Where the text begins."""
    behaviour_logprobs: NDArray[np.float32]
    """[T - start]."""
    likeliest: NDArray[np.int32]
    """[T - start, Q]."""
    finished: bool
    version: int
    """Updates that the weights had when they wrote it."""
    place: str
    """File and row of the prompt."""
    teacher: str


@dataclass(kw_only=True, slots=True)
class InFlight:
    """The rollouts that no step has taken yet, by context and step; a part of every checkpoint."""

    rollouts: dict[tuple[int, int], list[Rollout]] = field(default_factory=dict)

    def state(self) -> list[dict[str, Any]]:
        """What a checkpoint keeps: plain values and tensors."""
        return [
            {"context": context, "step": step, "rollouts": [_packed(each) for each in rollouts]}
            for (context, step), rollouts in self.rollouts.items()
        ]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Takes over what a checkpoint kept."""
        self.rollouts = {
            (each["context"], each["step"]): [_unpacked(packed) for packed in each["rollouts"]]
            for each in state
        }


def _packed(rollout: Rollout) -> dict[str, Any]:
    values = {each.name: getattr(rollout, each.name) for each in fields(rollout)}
    return {
        name: torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


def _unpacked(packed: Mapping[str, Any]) -> Rollout:
    values: dict[str, Any] = {
        name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in packed.items()
    }
    return Rollout(**values)
