"""The run that is expected next, and the time for which a process waits for it: after a sign that a run may come, never for ever."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path

import psutil

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1.run_pb2 import Run, RunSpec
from stillhouse.student_trainer.config.proto import read
from stillhouse.student_trainer.config.schema import RunConfig
from stillhouse.student_trainer.config.settled.cpu_threads import has_teacher_beside
from stillhouse.student_trainer.runs.settings import StandbyMode
from stillhouse.student_trainer.runs.supervision import training_process
from stillhouse.student_trainer.runs.supervision.device_slots import DeviceRequest, DeviceSlots
from stillhouse.student_trainer.runs.supervision.first_standby import CoreSample, any_run
from stillhouse.student_trainer.runs.supervision.standby import FREE_BYTES, Expected

PATIENCE_S = 600.0
"""Time for which a process waits after the last sign of a run, by default; and without calls after which one is a sign."""
CHECK_S = 10.0
"""Time between two looks at the free memory."""
SAMPLE_S = 1.0
"""Time over which the machine's idle cores are counted."""
IDLE_CORES = 0.75
"""Cores that must be idle before a process imports its libraries without a client's call."""


class RunExpectation:
    """Signs of a run to come, and what a process can prepare for it."""

    def __init__(
        self,
        mode: StandbyMode,
        slots: DeviceSlots,
        *,
        credentials: Path,
        on_change: Callable[[], None],
        patience_s: float = PATIENCE_S,
        idle_cores: float = IDLE_CORES,
        free_bytes: Callable[[], int] = lambda: psutil.virtual_memory().available,
        check_s: float = CHECK_S,
    ) -> None:
        """Calls `on_change` where `expected` may have become another."""
        self._mode = mode
        self._slots = slots
        self._credentials = credentials
        self._on_change = on_change
        self._patience_s = patience_s
        self._idle_cores = idle_cores
        self._free_bytes = free_bytes
        self._check_s = check_s
        self._waits = False
        """True if a process waits because a run is near."""
        self._like: Expected | None = None
        """Needs of the run that was started or checked last."""
        self._until_s = self._called_s = -math.inf
        self._timer: asyncio.TimerHandle | None = None

    async def start(self, newest: RunSpec | None, *, has_core: bool) -> None:
        """Waits for a run like `newest`, of an earlier service, once a core is idle: programs that start beside this one go first.

        It waits at once if a process that began with the service `has_core`, one of its own.
        """
        if newest is not None:
            self._like = self.needs(newest, self._slots.next_free)
        if has_core:
            self.sign()
            return
        for _ in range(math.ceil(self._patience_s / SAMPLE_S)):
            sample = CoreSample()
            await asyncio.sleep(SAMPLE_S)
            if sample.idle_cores() >= self._idle_cores:
                self.sign()
                return

    def expected(self, waiting: Run | None, *, is_idle: bool) -> Expected | None:
        """The run that a process shall wait for: `waiting`, the first queued one, or one like the last; None if none shall."""
        if self._mode == "off":
            return None
        if waiting is not None:
            return self.needs(waiting.effective_spec, self._slots.foreseen)
        self._waits = is_idle and self._is_near()
        if self._mode == "always" or self._waits:
            return self._like or any_run(self._slots, self._credentials)
        return None

    def sign(self) -> None:
        """Waits for a run from now on, as for one whose rows are sent, or after the end of another."""
        self._until_s = asyncio.get_running_loop().time() + self._patience_s
        self.close()
        self._look()

    def called(self) -> None:
        """Takes a client's call for a sign if it is the first for long; those of a program that polls are none."""
        before, self._called_s = self._called_s, asyncio.get_running_loop().time()
        if self._called_s > before + self._patience_s:
            self.sign()

    def checked(self, effective: RunSpec) -> None:
        """Waits for a run of this spec, which a client has had checked."""
        self._like = self.needs(effective, self._slots.next_free) or self._like
        self.sign()

    def started(self, run: Expected) -> None:
        """Learns the needs of a run that starts: the next one is expected to be like it."""
        self._like = run

    def _look(self) -> None:
        """Tells of a change at once, at the end of the patience, and in between, as free memory changes."""
        self._on_change()
        loop = asyncio.get_running_loop()
        if loop.time() <= self._until_s:
            at_s = min(loop.time() + self._check_s, self._until_s + 0.1)
            self._timer = loop.call_at(at_s, self._look)

    def close(self) -> None:
        """Waits for no run any more."""
        if self._timer is not None:
            self._timer.cancel()

    def environ(self, config: RunConfig, devices: tuple[int, ...], *, halve: bool = False) -> dict[str, str]:
        """The environment of a run's process."""
        return training_process.environment(
            devices=devices,
            threads=self._slots.threads(devices, beside_teacher=has_teacher_beside(config)),
            credentials=self._credentials,
            halve=halve,
        )

    def needs(
        self, effective: RunSpec, devices_of: Callable[[DeviceRequest], tuple[int, ...] | None]
    ) -> Expected | None:
        """Needs of a run; None if its devices are not known yet, or it has several processes."""
        try:
            config = read(RunConfig, effective)
        except StillhouseError:
            return None  # its start will say why
        devices = devices_of(DeviceRequest.from_spec(effective))
        if devices is None or config.resources.processes > 1:
            return None
        return Expected(environ=self.environ(config, devices), adapter=config.student.trains_adapter)

    def _is_near(self) -> bool:
        needed = FREE_BYTES // 2 if self._waits else FREE_BYTES
        return asyncio.get_running_loop().time() < self._until_s and self._free_bytes() >= needed
