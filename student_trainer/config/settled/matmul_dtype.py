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
