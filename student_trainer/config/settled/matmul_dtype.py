"""Chooses the matmul dtype of a run on a CPU by a table of processors, once: nothing is measured, and torch is not needed.

Torch multiplies half precision on any processor. Without instructions for it that takes many times as long as float32; with
those of AVX-512 alone twice as long on some processors and half as long on others. Float32 is more exact as well, so it is
taken wherever the table has no row. A choice is kept with the run and in its checkpoints, because another type has other bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillhouse.protos.telemetry.processor import Processor as Processor  # noqa: PLC0414 - re-exported
from stillhouse.student_trainer.config.schema import OptimizerConfig

_FAST: Sequence[tuple[str, str, str | None]] = (
    ("bfloat16", "amx_bf16", None),
    ("float16", "amx_fp16", None),
    # 2.3 to 3 times as fast as float32. Intel's, without AMX, run at half the rate of float32 and are left out.
    ("bfloat16", "avx512_bf16", "AuthenticAMD"),
    # ARM.
    ("bfloat16", "bf16", None),
)
"""Dtypes that processors with a flag, of one vendor or of all (None), multiply faster than float32."""


def matmul_dtype(dtype: str, processor: Processor) -> str:
    """`dtype` ("bfloat16", "float16"), or "float32" where `processor` is not known to multiply it faster."""
    for fast, flag, vendor in _FAST:
        if fast == dtype and flag in processor.flags and vendor in (None, processor.vendor):
            return dtype
    return "float32"


def settle(optimizer: OptimizerConfig, processor: Processor) -> str:
    """The matmul dtype of a run on a CPU: the one that is set, else the table's for the run's precision."""
    if optimizer.matmul_dtype is not None:
        return optimizer.matmul_dtype
    return matmul_dtype("bfloat16", processor) if optimizer.precision == "bf16" else "float32"
