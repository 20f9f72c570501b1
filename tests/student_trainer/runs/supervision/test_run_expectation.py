"""The run that is expected next: after which signs a process waits for it, for how long, and with which needs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stillhouse.protos.stillhouse.v1.run_pb2 import Run, RunSpec
from stillhouse.student_trainer.config.proto import from_proto, to_proto
from stillhouse.student_trainer.runs.settings import StandbyMode
from stillhouse.student_trainer.runs.supervision.device_slots import DeviceSlots
from stillhouse.student_trainer.runs.supervision.first_standby import (
    LEAST_SAMPLE_S,
    CoreSample,
    FirstStandby,
)
from stillhouse.student_trainer.runs.supervision.run_expectation import RunExpectation
from stillhouse.student_trainer.runs.supervision.standby import FREE_BYTES, Expected, Standby
from tests.student_trainer.config.specs import SMALLEST, spec_of

PATIENCE_S = 0.4


def expectation(
    folder: Path,
    mode: StandbyMode = "queue",
    *,
    changes: list[float] | None = None,
    gpus: tuple[int, ...] = (),
    idle_cores: float = 0.0,
    free_bytes: Callable[[], int] = lambda: FREE_BYTES,
) -> RunExpectation:
    changes = [] if changes is None else changes
    return RunExpectation(
        mode,
        DeviceSlots(gpus=gpus, cpu_slots=1),
        credentials=folder / "none",
        on_change=lambda: changes.append(asyncio.get_running_loop().time()),
        patience_s=PATIENCE_S,
        idle_cores=idle_cores,
        free_bytes=free_bytes,
        check_s=PATIENCE_S / 4,
    )


def effective(changes: dict[str, Any]) -> RunSpec:
    return to_proto(from_proto(spec_of({**SMALLEST, **changes})))


def waits(run: RunExpectation) -> Expected | None:
    return run.expected(None, is_idle=True)


async def test_a_process_waits_for_a_while_after_each_sign(tmp_path: Path) -> None:
    changes: list[float] = []
    run = expectation(tmp_path, changes=changes)
    assert waits(run) is None
    run.sign()
    assert waits(run) is not None
    assert run.expected(None, is_idle=False) is None
    await asyncio.sleep(PATIENCE_S / 2)
    run.sign()
    await asyncio.sleep(PATIENCE_S * 0.7)
    assert waits(run) is not None
    before = len(changes)
    await asyncio.sleep(PATIENCE_S + 0.2)
    assert waits(run) is None
    after = len(changes)
    assert after > before  # its end is told too
    await asyncio.sleep(PATIENCE_S)
    assert len(changes) == after
    run.close()


async def test_memory_decides_as_it_changes(tmp_path: Path) -> None:
    free = [FREE_BYTES - 1]
    changes: list[float] = []
    run = expectation(tmp_path, changes=changes, free_bytes=lambda: free[-1])
    run.sign()
    assert waits(run) is None
    await asyncio.sleep(PATIENCE_S / 2)
    assert len(changes) > 1  # it is looked at again
    free.append(FREE_BYTES)
    assert waits(run) is not None
    free.append(FREE_BYTES // 2)  # among others because of the process
    assert waits(run) is not None
    free.append(FREE_BYTES // 2 - 1)
    assert waits(run) is None
    free.append(FREE_BYTES - 1)
    assert waits(run) is None
    run.close()


async def test_calls_of_a_program_that_polls_are_no_signs(tmp_path: Path) -> None:
    run = expectation(tmp_path)
    run.called()
    assert waits(run) is not None
    for _ in range(8):
        await asyncio.sleep(PATIENCE_S / 5)
        run.called()
    assert waits(run) is None
    await asyncio.sleep(PATIENCE_S + 0.1)
    run.called()
    assert waits(run) is not None
    run.close()


async def test_a_service_that_starts_waits_for_a_run_like_its_newest(tmp_path: Path) -> None:
    run = expectation(tmp_path)
    await run.start(effective({"student": {"model": "m", "lora": {"rank": 8}}}), has_core=False)
    like = waits(run)
    assert like is not None
    assert like.adapter
    run.close()


async def test_a_service_that_starts_amid_other_work_waits_for_a_call(tmp_path: Path) -> None:
    run = expectation(tmp_path, idle_cores=1e6)
    await run.start(None, has_core=False)
    assert waits(run) is None
    run.called()
    assert waits(run) is not None
    run.close()


async def test_a_process_that_began_with_its_service_goes_on_waiting_if_it_has_a_core(tmp_path: Path) -> None:
    run = expectation(tmp_path, idle_cores=1e6)
    await run.start(None, has_core=True)
    assert waits(run) is not None
    run.close()


@pytest.mark.parametrize(("own_cpu_s", "has_core"), [(1e6, True), (-1e6, False)])
def test_what_a_process_computes_counts_as_idle(own_cpu_s: float, has_core: bool, tmp_path: Path) -> None:
    seconds = iter((0.0, own_cpu_s))
    first = FirstStandby(
        slots=DeviceSlots(gpus=(), cpu_slots=1),
        standby=Standby(tmp_path),
        sample=CoreSample(lambda: next(seconds)),
    )
    time.sleep(LEAST_SAMPLE_S)
    assert first.has_core() == has_core


async def test_a_run_that_was_checked_is_the_one_expected(tmp_path: Path) -> None:
    run = expectation(tmp_path)
    run.sign()
    before = waits(run)
    run.checked(effective({"student": {"model": "m", "lora": {"rank": 8}}}))
    after = waits(run)
    assert before is not None
    assert after is not None
    assert (before.adapter, after.adapter) == (False, True)
    run.checked(effective({"resources": {"num_processes": 2}}))  # starts processes of its own
    assert waits(run) == after
    run.close()


@pytest.mark.parametrize(("gpus", "devices"), [((), ""), ((3,), "3"), ((0, 1), "0")])
async def test_an_unknown_run_is_expected_on_the_device_that_it_would_get(
    gpus: tuple[int, ...], devices: str, tmp_path: Path
) -> None:
    run = expectation(tmp_path, gpus=gpus)
    run.sign()
    like = waits(run)
    assert like is not None
    assert like.environ["CUDA_VISIBLE_DEVICES"] == devices
    run.close()


async def test_modes(tmp_path: Path) -> None:
    queued = Run(effective_spec=effective({}))
    off, queue, always = (expectation(tmp_path, mode) for mode in ("off", "queue", "always"))
    off.sign()
    assert [each.expected(queued, is_idle=False) is not None for each in (off, queue, always)] == [
        False,
        True,
        True,
    ]
    assert [waits(each) is not None for each in (off, queue, always)] == [False, False, True]
    off.close()
