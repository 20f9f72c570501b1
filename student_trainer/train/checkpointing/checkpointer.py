"""Checkpoints of a run with any number of ranks: the first one reads and writes files, all keep the same state."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping
from typing import Any

import structlog
from torch import Tensor

from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.config.settled.matmul_dtype import Processor, settle
from stillhouse.student_trainer.run_dir import Attempt
from stillhouse.student_trainer.train.checkpointing import checkpoint
from stillhouse.student_trainer.train.checkpointing.checkpoint import TrainingState
from stillhouse.student_trainer.train.checkpointing.triggers import Triggers
from stillhouse.student_trainer.train.distributed.ranks import Ranks
from stillhouse.student_trainer.train.rollouts.rollout_buffer import RolloutBuffer

log = structlog.get_logger()

MAX_ROLLOUT_WAIT_S = 60.0
"""Time for which a checkpoint waits for rollouts that services are writing with the present weights."""


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
        self._protected: int | None = None

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

    def agree_matmul_dtype(self, config: RunConfig, accelerator: Any) -> str | None:
        """The run's matmul dtype: that of the checkpoint that was restored, else of `config`; None on a GPU.

        Of several processes the first one's counts. So neither a resume nor another host chooses again, not even for a run
        that is older than the setting. One exception: a type that the user has set in both specs of the run since that
        checkpoint wins over it, and the log says so.
        """
        own = self._kept_matmul_dtype(config) if accelerator.device.type == "cpu" else None
        agreed: str | None = self._ranks.exchange(own, patient=True)[0]
        return agreed

    def _kept_matmul_dtype(self, config: RunConfig) -> str | None:
        if not self._ranks.is_first:
            return None
        run_dir, step = self._attempt.run_dir, self._saved_step
        kept = checkpoint.facts_of(run_dir, step).get("matmul_dtype") if step is not None else None
        chosen = settle(config.optimizer, Processor.read())
        if kept in (None, "", chosen) or not run_dir.spec().optimizer.HasField("matmul_dtype"):
            return kept or chosen
        log.warning("optimizer.matmul_dtype was changed; other bits from here on", before=kept, now=chosen)
        return chosen

    def kept_fact(self, name: str) -> str | None:
        """A fact of the checkpoint that was restored, in every rank; None without one."""
        own = None
        if self._ranks.is_first and self._saved_step is not None:
            own = checkpoint.facts_of(self._attempt.run_dir, self._saved_step).get(name)
        kept: str | None = self._ranks.exchange(own, patient=True)[0]
        return kept

    def record(self, facts: Mapping[str, str]) -> None:
        """Adds facts that every manifest holds from now on."""
        self._facts = {**self._facts, **facts}

    def protect(self, step: int) -> None:
        """Keeps the checkpoint of `step` beside the newest from now on, and no other one."""
        self._protected = step

    def save(self) -> None:
        """Writes a checkpoint, unless this step has one or none is taken yet."""
        step = self._state.progress.step
        if step in (0, self._saved_step):
            return
        began = time.monotonic()
        self._state.in_flight.drop_before(step)
        self._state.in_flight.finish_all(MAX_ROLLOUT_WAIT_S)
        parts = self._ranks.gather(self._state.in_flight.to_bytes())
        self._saved_step = step
        self._triggers.mark_saved()
        if not self._ranks.is_first:
            return
        in_flight = RolloutBuffer.merge(RolloutBuffer.from_bytes(part) for part in parts)
        whole = dataclasses.replace(self._state, in_flight=in_flight)
        checkpoint.save(self._attempt, whole, self._facts, keep=self._keep, protected=self._protected)
        self._triggers.mark_saved()
        self._attempt.report("checkpoint", step=step)
        log.info("checkpoint written", step=step, time_s=round(time.monotonic() - began, 3))
