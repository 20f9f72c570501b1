"""Rollouts that are sampled but not yet trained on, with the version of the weights that sampled them."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import structlog
import torch
from numpy.typing import NDArray

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rpc.pool.bounded_wait import BoundedWait
from stillhouse.student_trainer.train.process.waiting import Deadline

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled completion and its prompt. Field names are those of checkpoints."""

    token_ids: NDArray[np.int32]
    """[T]: prompt and completion."""
    start: int
    """Index of the completion's first token."""
    behaviour_logprobs: NDArray[np.float32]
    """[T - start]: log-probabilities under the sampling distribution."""
    likeliest: NDArray[np.int32]
    """[T - start, Q]: the student's top-k ids."""
    finished: bool
    version: int
    """Number of updates of the weights that sampled it."""
    place: str
    """File and row of the prompt."""
    teacher: str
    slot: int = 0
    """Position of its prompt in the run."""
    draws: NDArray[np.int32] | None = None
    """[T - start, R]: ids that the student drew from outside its top-k, -1 where it drew none; None if it never does."""
    draw_logprobs: NDArray[np.float32] | None = None
    """[T - start, R]: of each draw, in the distribution that it was drawn from."""


@dataclass(kw_only=True, slots=True)
class RolloutBuffer:
    """Rollouts that no step has consumed yet, by context and step; a part of every checkpoint."""

    rollouts: dict[tuple[int, int], list[Rollout]] = field(default_factory=dict)
    pending: dict[tuple[int, int], Callable[[BoundedWait], list[Rollout]]] = field(default_factory=dict)
    """Rollouts that are still being written: a wait for them, which may be called again after it was interrupted."""

    def finish(self, key: tuple[int, int], wait: BoundedWait) -> None:
        """Waits for the rollouts of a context and step, if they are pending. Raises what `wait` raises."""
        if key in self.pending:
            self.rollouts[key] = self.pending[key](wait)
            del self.pending[key]

    def finish_all(self, limit_s: float) -> None:
        """Waits for all that is pending, for a checkpoint; what is not there in time is written again after a restart."""
        wait = Deadline(limit_s)
        for key in list(self.pending):
            try:
                self.finish(key, wait)
            except (StillhouseError, TimeoutError) as error:
                log.warning("rollouts are not in the checkpoint", step=key[1] + 1, why=str(error))

    def drop_before(self, step: int) -> None:
        """Drops the rollouts of steps before `step`, which were consumed."""
        self.rollouts = {key: each for key, each in self.rollouts.items() if key[1] >= step}

    def keep_only(self, is_mine: Callable[[int], bool]) -> None:
        """Drops rollouts whose slot is another process's."""
        self.rollouts = {
            key: [each for each in several if is_mine(each.slot)] for key, several in self.rollouts.items()
        }

    @classmethod
    def merge(cls, buffers: Iterable[RolloutBuffer]) -> RolloutBuffer:
        """Merges the rollouts of several processes in the order of a single one."""
        rollouts: dict[tuple[int, int], list[Rollout]] = {}
        for part in buffers:
            for key, several in part.rollouts.items():
                rollouts.setdefault(key, []).extend(several)
        return cls(
            rollouts={key: sorted(rollouts[key], key=lambda each: each.slot) for key in sorted(rollouts)}
        )

    def to_bytes(self) -> bytes:
        """Serialises the rollouts for another process."""
        buffer = io.BytesIO()
        torch.save(self.state(), buffer)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> RolloutBuffer:
        """Deserialises the rollouts of another process."""
        buffer = cls()
        buffer.restore(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
        return buffer

    def state(self) -> list[dict[str, Any]]:
        """Returns the state for a checkpoint: plain values and tensors."""
        return [
            {"context": context, "step": step, "rollouts": [_packed(each) for each in rollouts]}
            for (context, step), rollouts in self.rollouts.items()
        ]

    def restore(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Restores the state of a checkpoint."""
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
