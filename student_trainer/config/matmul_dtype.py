"""Chooses the matmul dtype of a run on a CPU by a table of processors, once: nothing is measured, and torch is not needed.

Torch multiplies half precision on any processor. Without instructions for it that takes many times as long as float32; with
those of AVX-512 alone twice as long on some processors and half as long on others. Float32 is more exact as well, so it is
taken wherever the table has no row. A choice is kept with the run and in its checkpoints, because another type has other bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stillhouse.student_trainer.config.schema import OptimizerConfig

CPUINFO = Path("/proc/cpuinfo")
_LABELS = {"vendor_id": "vendor", "flags": "flags", "Features": "flags"}
"""Labels of /proc/cpuinfo on x86 and ARM; ARM names no vendor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processor:
    """Vendor and instruction flags, as /proc/cpuinfo spells them; both are empty where they are not known."""

    vendor: str = ""
    flags: frozenset[str] = frozenset()

    @classmethod
    def read(cls, path: Path = CPUINFO) -> Processor:
        """The first processor of this host; an unknown one if the operating system does not tell."""
        try:
            first = path.read_text(encoding="utf-8", errors="replace").strip().partition("\n\n")[0]
        except OSError:
            return cls()
        found = {"vendor": "", "flags": ""}
        for line in first.splitlines():
            label, _, value = line.partition(":")
            if label.strip() in _LABELS:
                found[_LABELS[label.strip()]] = value.strip()
        return cls(vendor=found["vendor"], flags=frozenset(found["flags"].split()))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fast:
    """Processors that multiply `dtype` faster than float32: those with `flag`, of one vendor or of all (None)."""

    dtype: str
    flag: str
    vendor: str | None = None


_TABLE: Sequence[_Fast] = (
    _Fast(dtype="bfloat16", flag="amx_bf16"),
    _Fast(dtype="float16", flag="amx_fp16"),
    # 2.3 to 3 times as fast as float32. Intel's, without AMX, run at half the rate of float32 and are left out.
    _Fast(dtype="bfloat16", flag="avx512_bf16", vendor="AuthenticAMD"),
    # ARM.
    _Fast(dtype="bfloat16", flag="bf16"),
)


def matmul_dtype(dtype: str, processor: Processor) -> str:
    """`dtype` ("bfloat16", "float16"), or "float32" where `processor` is not known to multiply it faster."""
    fast = any(
        row.dtype == dtype and row.flag in processor.flags and row.vendor in (None, processor.vendor)
        for row in _TABLE
    )
    return dtype if fast else "float32"


def settle(optimizer: OptimizerConfig, processor: Processor) -> str:
    """The matmul dtype of a run on a CPU: the one that is set, else the table's for the run's precision."""
    if optimizer.matmul_dtype is not None:
        return optimizer.matmul_dtype
    return matmul_dtype("bfloat16", processor) if optimizer.precision == "bf16" else "float32"
