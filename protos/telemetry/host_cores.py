"""Cores of this machine that a process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")


def usable_cores(control_groups: Path = CONTROL_GROUPS, own_groups: Path = OWN_GROUPS) -> int:
    """Returns the cores that this process may use: those of its affinity, or its control groups' quota, rounded up, if that is
    less. A container with `--cpus` has a quota, while its affinity is the whole machine."""
    cores = len(os.sched_getaffinity(0))
    quotas = [-(-quota // period) for quota, period in _quotas(control_groups, own_groups)]
    return max(1, min([cores, *quotas]))


def openmp_threads(environ: Mapping[str, str] = os.environ) -> int | None:
    """Returns the threads that OMP_NUM_THREADS asks for, the outermost of a list as "4,2"; None where OpenMP ignores it."""
    first = environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isascii() and first.isdecimal() and int(first) > 0 else None


def _quotas(control_groups: Path, own_groups: Path) -> Iterator[tuple[int, int]]:
    """Microseconds of processor time and of the period that they count in, of each group that has a quota."""
    for line in filter(None, _words(own_groups, "\n")):
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root = control_groups
        elif "cpu" in controllers.split(","):
            root = control_groups / controllers
        else:
            continue
        own = root / group.lstrip("/")
        # In a container the path may be the host's; its own group is the root then.
        for each in {root, own, *(parent for parent in own.parents if parent.is_relative_to(root))}:
            pair = _words(each / "cpu.max") or [
                *_words(each / "cpu.cfs_quota_us"),
                *_words(each / "cpu.cfs_period_us"),
            ]
            if len(pair) == 2 and all(number.isdecimal() and int(number) > 0 for number in pair):
                yield int(pair[0]), int(pair[1])


def _words(path: Path, separator: str | None = None) -> list[str]:
    try:
        return path.read_text().strip().split(separator)
    except OSError:
        return []
