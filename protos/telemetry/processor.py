"""This host's processor, as the operating system tells it, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_LABELS = {"vendor_id": "vendor", "flags": "flags", "Features": "flags"}
"""Labels of /proc/cpuinfo on x86 and ARM; ARM names no vendor."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processor:
    """Vendor and instruction flags, as /proc/cpuinfo spells them; both are empty where they are not known."""

    vendor: str = ""
    flags: frozenset[str] = frozenset()

    @property
    def prefers_onednn(self) -> bool:
        """True if oneDNN multiplies float32 about twice as fast as MKL, whose code for AMD's processors has no AVX-512."""
        return self.vendor == "AuthenticAMD" and "avx512f" in self.flags

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
