"""Devices from the driver library, in processes that load a stand-in for it, or none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "support" / "nvml.c"
SHOW = """
import json
from stillhouse.protos.telemetry.gpu_memory import GpuMemory
from stillhouse.protos.telemetry.gpus import list_gpus, visible_gpus
print(json.dumps({
    "gpus": [[each.index, each.name, each.driver, each.used_bytes, each.free_bytes] for each in list_gpus()],
    "visible": visible_gpus(),
    "metrics": [[each.name, each.value, each.labels] for each in GpuMemory(only=(2,))()],
}))
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("driver")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", directory / "libnvidia-ml.so.1", SOURCE], check=True)
    return directory


def shown(directory: Path | None, visible: str | None = None) -> dict[str, list[object]]:
    env = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    if directory is not None:
        env["LD_LIBRARY_PATH"] = str(directory)
    if visible is not None:
        env["CUDA_VISIBLE_DEVICES"] = visible
    done = subprocess.run([sys.executable, "-c", SHOW], env=env, check=True, capture_output=True)
    found: dict[str, list[object]] = json.loads(done.stdout)
    return found


def test_a_lost_device_is_skipped_and_a_mig_device_is_the_sum_of_its_instances(driver: Path) -> None:
    found = shown(driver)
    assert found["gpus"] == [[0, "Device 0", "580.1", 100, 900], [2, "Device 2", "580.1", 60, 40]]
    assert found["visible"] == [0, 2]
    assert found["metrics"] == [
        ["gpu_memory_used_bytes", 60, {"gpu": "2"}],
        ["gpu_memory_total_bytes", 100, {"gpu": "2"}],
    ]


@pytest.mark.parametrize(
    ("visible", "indices"),
    [("2, 3", [2, 3]), ("", []), ("GPU-20,0", [2, 0]), ("0,-1,2", [0]), ("MIG-abc", []), ("GPU-", [])],
)
def test_visible_devices_are_those_of_the_environment(driver: Path, visible: str, indices: list[int]) -> None:
    found = shown(driver, visible)
    assert found["visible"] == indices
    assert len(found["gpus"]) == 2


def test_a_machine_without_a_driver_has_no_devices(tmp_path: Path) -> None:
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"no library")
    assert shown(tmp_path) == {"gpus": [], "visible": [], "metrics": []}
