"""Checkpoints of a run with any number of ranks: the first one reads and writes files, all keep the same state."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping

import structlog
from torch import Tensor

from stillhouse.student_trainer.run_dir import Attempt
from stillhouse.student_trainer.train.checkpointing import checkpoint
from stillhouse.student_trainer.train.checkpointing.checkpoint import TrainingState
from stillhouse.student_trainer.train.checkpointing.triggers import Triggers
from stillhouse.student_trainer.train.distributed.ranks import Ranks
from stillhouse.student_trainer.train.rollouts.rollout_buffer import RolloutBuffer

log = structlog.get_logger()


class Checkpointer:
    """Restores and saves the state of one run."""

    def __init__(
        self, attempt: Attempt, ranks: Ranks, state: TrainingState, triggers: Triggers, *, keep: int
    ) -> None:
        """`keep`: number of checkpoints that stay on disk."""
        self._attempt = attempt
        self._ranks = ranks
        self._state = state
        self._triggers = triggers
        self._keep = keep
        self._facts: Mapping[str, str] = {}
        self._saved_step: int | None = None

    def restore(self, trained: Iterable[Tensor]) -> int | None:
        """Restores the newest whole checkpoint, in every rank; its step, None if there is none.

        All ranks then have the first one's values of `trained`. Raises StillhouseError(CHECKPOINT_CORRUPT).
        """
        own = checkpoint.restore(self._attempt, self._state) if self._ranks.is_first else None
        found: int | None = self._ranks.exchange(own, patient=True)[0]
        if found is not None and not self._ranks.is_first:
            checkpoint.restore_step(self._attempt.run_dir, found, self._state)
        self._state.in_flight.keep_only(self._ranks.is_mine)
        self._ranks.broadcast(trained)
        self._saved_step = found
        self._triggers.mark_saved()
        return found

    def record(self, facts: Mapping[str, str]) -> None:
        """Sets the facts that every manifest holds from now on."""
        self._facts = facts

    def save(self) -> None:
        """Writes a checkpoint, unless this step has one or none is taken yet."""
        step = self._state.progress.step
        if step in (0, self._saved_step):
            return
        began = time.monotonic()
        self._state.in_flight.drop_before(step)
        parts = self._ranks.gather(self._state.in_flight.to_bytes())
        self._saved_step = step
        self._triggers.mark_saved()
        if not self._ranks.is_first:
            return
        in_flight = RolloutBuffer.merge(RolloutBuffer.from_bytes(part) for part in parts)
        whole = dataclasses.replace(self._state, in_flight=in_flight)
        checkpoint.save(self._attempt, whole, self._facts, keep=self._keep)
        self._triggers.mark_saved()
        self._attempt.report("checkpoint", step=step)
        log.info("checkpoint written", step=step, time_s=round(time.monotonic() - began, 3))
