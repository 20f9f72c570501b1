"""What this machine has: memory, devices and disk, asked of the operating system and nvidia-smi."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

QUERY_TIMEOUT_S = 20.0
_MIB, _KIB = 2**20, 2**10


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One device."""

    name: str
    driver: str
    total_bytes: int
    free_bytes: int


def gpus() -> list[Gpu]:
    """The NVIDIA devices of this machine; none if there is no driver that answers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [
        program,
        "--query-gpu=name,driver_version,memory.total,memory.free",
        "--format=csv,noheader,nounits",
    ]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = []
    for line in answer.stdout.splitlines() if answer.returncode == 0 else ():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 4 and cells[2].isdecimal() and cells[3].isdecimal():
            total, free = int(cells[2]) * _MIB, int(cells[3]) * _MIB
            found.append(Gpu(name=cells[0], driver=cells[1], total_bytes=total, free_bytes=free))
    return found


def memory_bytes() -> int | None:
    """The memory that this process may use: the machine's, or its control group's if that is less."""
    limits = []
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) * _KIB)
    limits += [int(line) for line in _lines(Path("/sys/fs/cgroup/memory.max")) if line.isdecimal()]
    return min(limits, default=None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
