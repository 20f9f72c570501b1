"""Device, precision and determinism of a training process, carried by accelerate."""

from __future__ import annotations

from typing import Any

import torch

from stillhouse.student_trainer.config.checks import invalid_field
from stillhouse.student_trainer.config.schema import OptimizerConfig

_MIXED = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}


def make_accelerator(config: OptimizerConfig) -> Any:
    """Makes the accelerator on the first visible GPU, else the CPU.

    On a CPU with a fixed number of threads everything is deterministic; on a GPU, operations with a deterministic
    algorithm are. Raises StillhouseError(INVALID_SPEC) for a precision that the device lacks.
    """
    from accelerate import Accelerator

    has_gpu = torch.cuda.is_available()
    precision = config.precision or ("bf16" if has_gpu else "fp32")
    if precision == "fp16" and not has_gpu:
        description = "fp16 needs a GPU, and this process has none; use bf16 or fp32."
        raise invalid_field("optimizer.precision", description)
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    # Filling costs time, and nothing here reads uninitialised memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return Accelerator(cpu=not has_gpu, mixed_precision=_MIXED[precision])


def precision_of(accelerator: Any) -> str:
    """Returns "bf16", "fp16" or "fp32"."""
    return {mixed: name for name, mixed in _MIXED.items()}[str(accelerator.mixed_precision)]
