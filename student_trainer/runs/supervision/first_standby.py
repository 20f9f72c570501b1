"""The standby process of a service that starts: begun before the service imports its other parts, so this module imports few."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from stillhouse.protos.telemetry.gpus import visible_gpus
from stillhouse.student_trainer.runs.data_dir import DataDir
from stillhouse.student_trainer.runs.settings import RunServiceSettings
from stillhouse.student_trainer.runs.supervision import training_process
from stillhouse.student_trainer.runs.supervision.device_slots import DeviceRequest, DeviceSlots
from stillhouse.student_trainer.runs.supervision.standby import FREE_BYTES, Expected, Standby

OWN_CORE = 0.9
"""Share of a core that a process has while its service starts, idle time included, if no other program wants that core."""
LEAST_SAMPLE_S = 0.1
"""Least time over which cores are sampled; the kernel counts hundredths of a second."""


class CoreSample:
    """Idle cores of the machine since a moment."""

    def __init__(self, own_cpu_s: Callable[[], float] = lambda: 0.0) -> None:
        """`own_cpu_s` are the processor seconds of a process that counts as idle, because it can be ended."""
        self._own_cpu_s = own_cpu_s
        self._began_s = time.monotonic()
        self._idle_s = _idle_s() + own_cpu_s()

    def idle_cores(self) -> float:
        """Cores that were idle on average; 0 before there is a sample."""
        sampled_s = time.monotonic() - self._began_s
        if sampled_s < LEAST_SAMPLE_S:
            return 0.0
        return (_idle_s() + self._own_cpu_s() - self._idle_s) / sampled_s


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstStandby:
    """A service's devices and standby process, before there is a service."""

    slots: DeviceSlots
    standby: Standby
    sample: CoreSample
    """Cores that were idle, or computed for the process."""

    @classmethod
    def begin(cls, settings: RunServiceSettings, data_dir: DataDir) -> Self:
        """Starts a process that waits, unless it is unwanted or memory is short. Whoever calls this closes `standby`."""
        gpus = visible_gpus() if settings.gpus is None else settings.gpus
        slots = DeviceSlots(gpus=gpus, cpu_slots=settings.cpu_slots)
        standby = Standby(data_dir.path)
        if settings.standby != "off" and psutil.virtual_memory().available >= FREE_BYTES:
            standby.keep(any_run(slots, data_dir.credentials_path))
        return cls(slots=slots, standby=standby, sample=CoreSample(standby.cpu_s))

    def has_core(self) -> bool:
        """True if the process took no core from another program."""
        return self.sample.idle_cores() >= OWN_CORE


def any_run(slots: DeviceSlots, credentials: Path) -> Expected | None:
    """Needs of a run of which nothing is known: it has one device, or the CPU beside a teacher."""
    devices = slots.next_free(DeviceRequest(count=min(1, len(slots.gpus))))
    if devices is None:
        return None
    threads = slots.threads(devices, beside_teacher=True)
    environ = training_process.environment(devices=devices, threads=threads, credentials=credentials)
    return Expected(environ=environ, adapter=False)


def _idle_s() -> float:
    """Seconds that the machine's cores, all together, have been idle since its start."""
    times = psutil.cpu_times()
    return float(times.idle + getattr(times, "iowait", 0.0))
