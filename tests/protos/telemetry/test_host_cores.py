"""Cores of a machine: affinity, quotas of control groups, and OpenMP's setting."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stillhouse.protos.telemetry.host_cores import openmp_threads, usable_cores

ALL = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, ALL),
        ("0::/\n", {}, ALL),
        ("", {"cpu.max": "100000 100000\n"}, ALL),
        ("0::/slice/pod\n", {"slice/cpu.max": "100000 100000\n", "slice/pod/cpu.max": "max 100000\n"}, 1),
        ("0::/host/path\n", {"cpu.max": "100000 100000\n"}, 1),
        (
            "3:cpu,cpuacct:/box\n1:name=systemd:/\n",
            {
                "cpu,cpuacct/box/cpu.cfs_quota_us": "100000\n",
                "cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
        (
            "3:cpu:/box\n",
            {"cpu/box/cpu.cfs_quota_us": "-1\n", "cpu/box/cpu.cfs_period_us": "100000\n"},
            ALL,
        ),
        ("0::/\n", {"cpu.max": "100000000 100000\n"}, ALL),
    ],
)
def test_a_quota_limits_the_cores(tmp_path: Path, groups: str, files: dict[str, str], cores: int) -> None:
    own = tmp_path / "own"
    own.write_text(groups)
    root = tmp_path / "groups"
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert usable_cores(root, own) == cores


@pytest.mark.parametrize(
    ("value", "threads"),
    [
        (None, None),
        ("", None),
        ("3", 3),
        (" 3 ", 3),
        ("4,2", 4),
        ("0", None),
        ("-1", None),
        ("many", None),
        ("\u0663", None),
    ],
)
def test_threads_are_read_as_openmp_reads_them(value: str | None, threads: int | None) -> None:
    assert openmp_threads({} if value is None else {"OMP_NUM_THREADS": value}) == threads
