"""Memory of this machine that a process may use."""

from __future__ import annotations

from pathlib import Path


def memory_bytes() -> int | None:
    """Returns the memory that this process may use: the machine's, or its control group's limit if that is less."""
    limits = []
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) * 2**10)
    limits += [int(line) for line in _lines(Path("/sys/fs/cgroup/memory.max")) if line.isdecimal()]
    return min(limits, default=None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
