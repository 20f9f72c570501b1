"""Devices and CPU slots: a run gets all that it requests or nothing, and all is released."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec
from stillhouse.student_trainer.config.proto import from_proto, to_proto
from stillhouse.student_trainer.config.settled.matmul_dtype import Processor
from stillhouse.student_trainer.runs.api.spec_resolution import Host, resolve
from stillhouse.student_trainer.runs.supervision.device_slots import DeviceRequest, DeviceSlots
from stillhouse.student_trainer.runs.supervision.training_process import environment
from tests.student_trainer.config.specs import SMALLEST, spec_of


def test_cpu_slots_are_counted() -> None:
    slots = DeviceSlots(gpus=(), cpu_slots=2)
    need = DeviceRequest()
    assert slots.reserve(need) == slots.reserve(need) == ()
    assert slots.reserve(need) is None
    slots.release(())
    assert slots.reserve(need) == ()


def test_a_run_gets_the_devices_that_it_names_or_waits() -> None:
    slots = DeviceSlots(gpus=(0, 1, 3), cpu_slots=1)
    assert slots.reserve(DeviceRequest(gpus=(1,))) == (1,)
    assert slots.reserve(DeviceRequest(gpus=(1, 3))) is None
    assert slots.reserve(DeviceRequest(count=2)) == (0, 3)
    assert slots.reserve(DeviceRequest(count=1)) is None
    slots.release((0, 3))
    assert slots.next_free(DeviceRequest(count=1)) == (0,)
    assert slots.next_free(DeviceRequest(count=3)) is None
    assert slots.reserve(DeviceRequest(gpus=(3,))) == (3,)


def test_an_adopted_run_keeps_its_devices_even_if_there_are_fewer() -> None:
    slots = DeviceSlots(gpus=(0,), cpu_slots=1)
    slots.mark_reserved((0, 5))
    assert slots.reserve(DeviceRequest(count=1)) is None
    slots.release((0, 5))
    assert slots.reserve(DeviceRequest(count=1)) == (0,)
    slots.mark_reserved(())
    assert slots.reserve(DeviceRequest()) is None


@pytest.mark.parametrize(
    ("need", "lack"),
    [
        (DeviceRequest(gpus=(7,)), "device 7"),
        (DeviceRequest(count=2), "2 devices"),
        (DeviceRequest(), "--cpu-slots 1"),
    ],
)
def test_an_impossible_request_is_explained(need: DeviceRequest, lack: str) -> None:
    assert lack in str(DeviceSlots(gpus=(0,), cpu_slots=0).why_never(need))
    assert DeviceSlots(gpus=(0, 1, 7), cpu_slots=1).why_never(need) is None


def test_cores_are_shared_between_slots() -> None:
    cores = len(os.sched_getaffinity(0))
    assert DeviceSlots(gpus=(), cpu_slots=1).threads(()) == cores
    assert DeviceSlots(gpus=(0, 1), cpu_slots=1).threads((0,)) == max(1, cores // 2)
    assert DeviceSlots(gpus=(), cpu_slots=1000).threads(()) == 1
    assert DeviceSlots(gpus=(), cpu_slots=1).threads((), beside_teacher=True) == max(1, cores - 1)
    assert DeviceSlots(gpus=(0,), cpu_slots=1).threads((0,), beside_teacher=True) == cores


def test_an_effective_spec_determines_the_request() -> None:
    spec = RunSpec()
    spec.resources.gpu_count = 1
    assert DeviceRequest.from_spec(spec) == DeviceRequest(count=1)
    spec.resources.gpus.extend([0, 1])
    assert DeviceRequest.from_spec(spec) == DeviceRequest(gpus=(0, 1))


def test_a_run_has_a_process_for_each_of_its_devices(tmp_path: Path) -> None:
    spec = spec_of({**SMALLEST, "resources": {"gpus": [0, 2]}})
    config = from_proto(spec)
    assert config.resources.processes == 2
    assert from_proto(to_proto(config)) == config
    slots = DeviceSlots(gpus=(0, 1, 2), cpu_slots=1)
    devices = slots.reserve(DeviceRequest.from_spec(to_proto(config)))
    assert devices == (0, 2)
    given = environment(devices=devices, threads=slots.threads(devices), credentials=tmp_path / "none")
    assert given["CUDA_VISIBLE_DEVICES"] == "0,2"


@pytest.mark.parametrize(("asked", "count"), [({}, 1), ({"num_processes": 3}, 3), ({"gpu_count": 2}, 2)])
def test_devices_that_are_not_named_follow_the_processes(
    tmp_path: Path, asked: dict[str, int], count: int
) -> None:
    host = Host(
        data_dir=tmp_path / "data",
        roots=(tmp_path,),
        slots=DeviceSlots(gpus=(0, 1, 2), cpu_slots=1),
        find_dataset=lambda _: None,
        find_webhook_host=str,
        tracker_problem=lambda _: None,
        processor=Processor(),
    )
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")
    spec = spec_of(
        {
            "student": {"model": str(tmp_path / "student")},
            "teachers": [{"targets": ["a:1"]}],
            "data": {"train": [{"path": str(tmp_path / "rows.jsonl")}]},
            "resources": asked,
        }
    )
    resolved = resolve(from_proto(spec), host).config.resources
    assert (resolved.gpu_count, resolved.processes) == (count, count)
