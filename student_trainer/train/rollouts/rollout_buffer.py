"""The student's texts between writing and learning: recorded as drawn, with the version of the weights that wrote them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    slot: int = 0
    """Place of its prompt in the run."""


@dataclass(kw_only=True, slots=True)
class InFlight:
    """The rollouts that no step has taken yet, by context and step; a part of every checkpoint."""

    rollouts: dict[tuple[int, int], list[Rollout]] = field(default_factory=dict)

    def forget_before(self, step: int) -> None:
        """Drops the texts of the steps before `step`, which were taken."""
        self.rollouts = {key: each for key, each in self.rollouts.items() if key[1] >= step}

    def keep(self, is_mine: Callable[[int], bool]) -> None:
        """Keeps the texts whose slot is this process's."""
        self.rollouts = {
            key: [each for each in several if is_mine(each.slot)] for key, several in self.rollouts.items()
        }

    @classmethod
    def joined(cls, parts: Iterable[InFlight]) -> InFlight:
        """The texts of several processes in the order in which one alone would have them."""
        rollouts: dict[tuple[int, int], list[Rollout]] = {}
        for part in parts:
            for key, several in part.rollouts.items():
                rollouts.setdefault(key, []).extend(several)
        return cls(
            rollouts={key: sorted(rollouts[key], key=lambda each: each.slot) for key in sorted(rollouts)}
        )

    def to_bytes(self) -> bytes:
        """The texts for another process."""
        buffer = io.BytesIO()
        torch.save(self.state(), buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> InFlight:
        """The texts of another process."""
        in_flight = cls()
        in_flight.restore(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
        return in_flight

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
