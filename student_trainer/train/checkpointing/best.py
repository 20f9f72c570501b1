"""The best checkpoint by a metric of the evaluation: each checkpoint records it, so that a resumed run knows what it had."""

from __future__ import annotations

import json
from collections.abc import Mapping

import structlog

from stillhouse.protos.evaluation.names import is_better
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.train.checkpointing.checkpoint import find_damage
from stillhouse.student_trainer.train.checkpointing.checkpointer import Checkpointer

log = structlog.get_logger()

FACT = "best"
"""Name in a checkpoint's facts."""


class BestCheckpoint:
    """Writes a checkpoint whenever `evaluation.best_metric` improves, and knows which one is exported."""

    def __init__(self, metric: str, checkpointer: Checkpointer, run_dir: RunDir) -> None:
        """`metric` is empty if the last checkpoint is exported; `checkpointer` has restored the run."""
        self._metric = metric
        self._checkpointer = checkpointer
        self._run_dir = run_dir
        self.step: int | None = None
        """Step of the best checkpoint so far."""
        self._value = float("nan")
        kept = checkpointer.kept_fact(FACT) if metric else None
        if kept:
            best = json.loads(kept)
            self._set(best["step"], best["value"])

    @property
    def is_wanted(self) -> bool:
        """True if the run exports its best checkpoint."""
        return bool(self._metric)

    def see(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Writes the checkpoint of `step` if its evaluation is the best so far; all processes call this together."""
        value = metrics.get(f"eval/{self._metric}")
        if not self._metric or not step or value is None:
            return False
        if self.step is not None and not is_better(self._metric, value, self._value):
            return False
        if value != value:  # noqa: PLR0124 - NaN is no value to keep
            return False
        self._set(step, value)
        self._checkpointer.save()
        log.info("best checkpoint so far", step=step, metric=self._metric, value=value)
        return True

    def exported_step(self, last: int) -> int:
        """Returns the step whose weights are exported: the best one if its checkpoint is whole, else `last`."""
        if self.step is None or self.step == last:
            return last
        damage = find_damage(self._run_dir.checkpoint_path(self.step))
        if damage is not None:
            log.error(
                "the best checkpoint cannot be exported, and the last one is", step=self.step, why=damage
            )
            return last
        return self.step

    def _set(self, step: int, value: float) -> None:
        self.step, self._value = step, value
        self._checkpointer.record({FACT: json.dumps({"metric": self._metric, "step": step, "value": value})})
        self._checkpointer.protect(step)
