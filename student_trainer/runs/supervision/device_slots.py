"""Allocates devices and CPU slots to runs; a run gets all that it requests or nothing."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.protos.telemetry.host_cores import usable_cores


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceRequest:
    """Requested devices of a run: these indices, or a number of any; neither means a CPU slot."""

    gpus: tuple[int, ...] = ()
    count: int = 0

    @classmethod
    def from_spec(cls, effective: RunSpec) -> DeviceRequest:
        """The request of an effective spec."""
        resources = effective.resources
        return cls(gpus=tuple(resources.gpus), count=0 if resources.gpus else resources.gpu_count)

    @property
    def on_cpu(self) -> bool:
        """True if no device is requested."""
        return not self.gpus and not self.count


class DeviceSlots:
    """The devices of this service, and slots for runs on the CPU."""

    def __init__(self, *, gpus: Collection[int], cpu_slots: int) -> None:
        self.gpus = tuple(sorted(set(gpus)))
        self.cpu_slots = cpu_slots
        self._free = set(self.gpus)
        self._free_cpu = cpu_slots

    @property
    def num_free_gpus(self) -> int:
        """Number of free devices."""
        return len(self._free)

    @property
    def num_free_cpu(self) -> int:
        """Number of free CPU slots."""
        return max(0, self._free_cpu)

    def why_never(self, need: DeviceRequest) -> str | None:
        """The reason that this service can never meet `need`; None if it can."""
        offered = ", ".join(map(str, self.gpus)) or "none"
        unknown = sorted(set(need.gpus) - set(self.gpus))
        if unknown:
            return f"device {unknown[0]} is not offered by this service; it offers {offered}"
        if need.count > len(self.gpus):
            return f"{need.count} devices are requested; this service offers {offered}"
        if need.on_cpu and self.cpu_slots == 0:
            return "this service has no CPU slots; start it with --cpu-slots 1, or request a device"
        return None

    def reserve(self, need: DeviceRequest) -> tuple[int, ...] | None:
        """Reserves devices, an empty tuple for a CPU slot; None if they are not free."""
        devices = self.next_free(need)
        if devices is not None:
            self.mark_reserved(devices)
        return devices

    def next_free(self, need: DeviceRequest) -> tuple[int, ...] | None:
        """The devices that `reserve` would reserve now."""
        if need.on_cpu:
            return () if self._free_cpu > 0 else None
        devices = need.gpus or tuple(sorted(self._free)[: need.count])
        if len(devices) < need.count or not self._free.issuperset(devices):
            return None
        return devices

    def foreseen(self, need: DeviceRequest) -> tuple[int, ...] | None:
        """The devices that a waiting run will get; None if it may get one or another."""
        if need.on_cpu or need.gpus:
            return need.gpus
        return self.gpus if need.count == len(self.gpus) else None

    def mark_reserved(self, devices: tuple[int, ...]) -> None:
        """Marks the devices of an adopted run as reserved."""
        if devices:
            self._free.difference_update(devices)
        else:
            self._free_cpu -= 1

    def release(self, devices: tuple[int, ...]) -> None:
        """Frees reserved devices."""
        if devices:
            self._free.update(set(devices).intersection(self.gpus))
        else:
            self._free_cpu += 1

    def threads(self, devices: tuple[int, ...], *, beside_teacher: bool = False) -> int:
        """CPU threads of a process: its share of the cores, of which a teacher on this machine keeps one on the CPU."""
        cores = usable_cores()
        if devices:
            return max(1, cores // len(self.gpus))
        return max(1, (cores - int(beside_teacher)) // max(1, self.cpu_slots))
