"""The same optimizer steps in less memory: half the micro-batch and twice the accumulation, after a run has run out of it."""

from __future__ import annotations

from dataclasses import replace

from stillhouse.student_trainer.config.schema import RunConfig

HALVE_VARIABLE = "STILLHOUSE_HALVE_MICRO_BATCH"
"""Environment variable that the run service sets to 1 to halve the micro-batch of a training process."""


def smaller_micro_batch(config: RunConfig) -> RunConfig | None:
    """`config` with at most half the micro-batch and as many sequences in a step; None if it is 1 already."""
    optimizer = config.optimizer
    rows = optimizer.micro_batch_size * optimizer.grad_accum_steps
    half = optimizer.micro_batch_size // 2
    if half < 1:
        return None
    size = next(each for each in range(half, 0, -1) if rows % each == 0)
    return replace(config, optimizer=replace(optimizer, micro_batch_size=size, grad_accum_steps=rows // size))
