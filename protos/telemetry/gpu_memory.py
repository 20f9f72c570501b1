"""How full the memory of this machine's devices is, for metrics: asked of the driver, so that nobody needs a context on a device for it."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from stillhouse.protos.telemetry.metrics import Reading

QUERY_TIMEOUT_S = 3.0
KEEP_S = 10.0
"""A reading is used for so long: the page may be read often, and the driver's program takes its time."""
_MIB = 2**20
_QUERY = ("--query-gpu=index,memory.used,memory.total", "--format=csv,noheader,nounits")


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Of one device."""

    used_bytes: int
    total_bytes: int


class GpuMemory:
    """Takes the readings; called from the thread that serves the page."""

    def __init__(self, only: Collection[int] | None = None) -> None:
        """`only`: indices of the devices to speak of; None: all of the machine's."""
        self._only = only
        self._program = shutil.which("nvidia-smi")
        self._taken_at = -KEEP_S
        self._memory: Mapping[int, Memory] = {}

    def __call__(self) -> Iterator[Reading]:
        """Used and total bytes of each device; nothing where there is no driver that answers."""
        for index, memory in self._read().items():
            labels = {"gpu": str(index)}
            yield Reading(
                name="gpu_memory_used_bytes",
                help="Memory of a device that is in use, by whomever.",
                value=memory.used_bytes,
                labels=labels,
            )
            yield Reading(
                name="gpu_memory_total_bytes",
                help="Memory of a device.",
                value=memory.total_bytes,
                labels=labels,
            )

    def _read(self) -> Mapping[int, Memory]:
        now = time.monotonic()
        if self._program is not None and now - self._taken_at >= KEEP_S:
            self._taken_at = now
            found = parse(_ask(self._program))
            self._memory = {
                index: memory for index, memory in found.items() if self._only is None or index in self._only
            }
        return self._memory


def parse(answer: str) -> dict[int, Memory]:
    """Index to memory, from lines of "index, used MiB, total MiB"; a device that does not tell is left out."""
    found = {}
    for line in answer.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 3 and all(cell.isdecimal() for cell in cells):
            index, used, total = map(int, cells)
            found[index] = Memory(used_bytes=used * _MIB, total_bytes=total * _MIB)
    return found


def _ask(program: str) -> str:
    try:
        answer = subprocess.run(
            [program, *_QUERY], capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""
