"""The same optimizer steps in less memory: half the tokens, or rows, of a forward pass, after a run has run out of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

from stillhouse.student_trainer.config.schema import RunConfig

HALVE_VARIABLE = "STILLHOUSE_HALVE_MICRO_BATCH"
"""Environment variable that the run service sets to 1 to halve the micro-batch of a training process."""

MEMORY_ADVICE = (
    "Continue in smaller passes with the same updates: `stillhouse run resume RUN --set optimizer.micro_batch_tokens=N`, or "
    "optimizer.micro_batch_size=N in a run that sets it, which raises optimizer.grad_accum_steps alike; "
    "retry.halve_micro_batch does so by itself, and `--set student.gradient_checkpointing=true` saves memory too. Else give "
    "the process more memory, or create a run with student.quantization or a lower data.max_sequence_tokens."
)
"""Remedies for a training process that ran out of memory."""


AUTO_TOKENS: Mapping[str, int] = {"cpu": 4096, "gpu": 16384}
"""Tokens of a forward pass by kind of device where memory sets no lower limit: enough to keep it busy."""


def auto_tokens(kind: str) -> int:
    """AUTO_TOKENS of a device, or half of it in a process that is to take less memory."""
    return AUTO_TOKENS[kind] // (2 if os.environ.get(HALVE_VARIABLE) == "1" else 1)


def smaller_micro_batch(config: RunConfig) -> RunConfig | None:
    """`config` with at most half the tokens, or rows, in a pass and as many rows in a step; None if it is 1 already.

    A limit that the file leaves to the process is halved by `auto_tokens`.
    """
    optimizer = config.optimizer
    if not optimizer.cuts_by_rows:
        tokens = optimizer.micro_batch_tokens
        if tokens is None:
            return config
        smaller = replace(optimizer, micro_batch_tokens=max(1, tokens // 2))
        return replace(config, optimizer=smaller) if tokens > 1 else None
    rows, half = optimizer.rows_per_update, optimizer.rows_per_pass // 2
    if half < 1:
        return None
    size = next(each for each in range(half, 0, -1) if rows % each == 0)
    return replace(config, optimizer=replace(optimizer, micro_batch_size=size, grad_accum_steps=rows // size))
