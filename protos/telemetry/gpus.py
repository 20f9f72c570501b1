"""NVIDIA devices of this machine, read from the driver (NVML) without a CUDA context."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One device. Its index is the driver's, whatever CUDA_VISIBLE_DEVICES says."""

    index: int
    uuid: str
    """Such as "GPU-0aa1b2c3-…"."""
    name: str
    driver: str
    """Version of the driver."""
    total_bytes: int
    used_bytes: int
    """Memory in use by any process."""

    @property
    def free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes


def list_gpus() -> list[Gpu]:
    """The devices that report their memory; none without a driver that responds."""
    import pynvml

    found = []
    with suppress(pynvml.NVMLError), _driver():
        driver = pynvml.nvmlSystemGetDriverVersion()
        for index in range(pynvml.nvmlDeviceGetCount()):
            with suppress(pynvml.NVMLError):  # this one is lost, or hidden from this user
                device = pynvml.nvmlDeviceGetHandleByIndex(index)
                used, total = _memory(device)
                uuid, name = pynvml.nvmlDeviceGetUUID(device), pynvml.nvmlDeviceGetName(device)
                found.append(
                    Gpu(index=index, uuid=uuid, name=name, driver=driver, total_bytes=total, used_bytes=used)
                )
    return found


def visible_gpus() -> tuple[int, ...]:
    """Indices of the devices that this process may use, by CUDA_VISIBLE_DEVICES if it is set.

    Its list ends at the first unknown entry, as in CUDA. MIG instances have no index and count as unknown.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(each.index for each in list_gpus())
    entries = [each.strip() for each in visible.split(",")]
    by_uuid = {each.uuid: each.index for each in list_gpus()} if "GPU-" in visible else {}
    indices = []
    for entry in entries:
        named = [index for uuid, index in by_uuid.items() if entry and uuid.startswith(entry)]
        if not entry.isdecimal() and len(named) != 1:
            break
        indices.append(int(entry) if entry.isdecimal() else named[0])
    return tuple(indices)


@contextmanager
def _driver() -> Iterator[None]:
    import pynvml

    pynvml.nvmlInit()
    try:
        yield
    finally:
        pynvml.nvmlShutdown()


def _memory(device: Any) -> tuple[int, int]:
    """Used and total bytes; of its MIG instances if this user may see those alone."""
    import pynvml

    try:
        whole = pynvml.nvmlDeviceGetMemoryInfo(device)
    except (pynvml.NVMLError_NoPermission, pynvml.NVMLError_NotSupported):
        parts = []
        for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(device)):
            with suppress(pynvml.NVMLError_NotFound):
                instance = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index)
                parts.append(pynvml.nvmlDeviceGetMemoryInfo(instance))
        if not parts:
            raise
        return sum(each.used for each in parts), sum(each.total for each in parts)
    return whole.used, whole.total
