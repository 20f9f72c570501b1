"""Keeps the matmul dtype of a run: a resume computes in the type of the checkpoint that it begins with."""

from __future__ import annotations

from typing import Any

import structlog

from stillhouse.student_trainer.config.matmul_dtype import Processor, settle
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.run_dir import Attempt
from stillhouse.student_trainer.train.checkpointing.checkpoint import facts_of

log = structlog.get_logger()


def kept_matmul_dtype(config: RunConfig, attempt: Attempt, step: int | None, accelerator: Any) -> str | None:
    """The run's matmul dtype: that of the checkpoint of `step`, from which it resumes, else of `config`; None on a GPU.

    Of several processes the first one's counts. So neither a resume nor another host chooses again, not even for a run that is older than the setting. One exception: a
    type that the user has set in both specs of the run since that checkpoint wins over it, and the log says so.
    """
    if accelerator.device.type != "cpu":
        return None
    kept = facts_of(attempt.run_dir, step).get("matmul_dtype") if step is not None else None
    chosen = settle(config.optimizer, Processor.read())
    if kept in (None, "", chosen) or not attempt.run_dir.spec().optimizer.HasField("matmul_dtype"):
        return kept or chosen
    log.warning("optimizer.matmul_dtype was changed; other bits from here on", before=kept, now=chosen)
    return chosen
