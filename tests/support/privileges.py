"""Finds out rights that only some machines give: small disks, memory limits, other system calls; a test that cannot have one is skipped."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

NOT_ALLOWED = " is not allowed on this machine"
"""End of the reason of such a skip; it was tried."""
CGROUP = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def disk_of(path: Path, size_bytes: int) -> Iterator[Path]:
    """A file system of its own at `path`, in memory."""
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", path], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk" + NOT_ALLOWED)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@contextlib.contextmanager
def memory_limited(pid: int, limit_bytes: int) -> Iterator[None]:
    """Limits the memory that `pid` and the processes that it starts from here on take together; the kernel kills beyond it."""
    version_1 = (CGROUP / "memory").is_dir()
    group = CGROUP / ("memory" if version_1 else "") / f"stillhouse-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version_1 else "memory.max")).write_text(str(limit_bytes))
        with contextlib.suppress(OSError):
            (group / ("memory.memsw.limit_in_bytes" if version_1 else "memory.swap.max")).write_text(
                str(limit_bytes) if version_1 else "0"
            )
        (group / "cgroup.procs").write_text(str(pid))
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip("limiting memory" + NOT_ALLOWED)
    try:
        yield
    finally:
        above = group.parent / "cgroup.procs"
        for each in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(OSError):
                above.write_text(each)
        deadline = time.monotonic() + 10
        while group.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                group.rmdir()


def preloaded(source: Path, directory: Path) -> dict[str, str]:
    """The environment of a program some of whose system calls are those of the C file `source`."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    library = directory / source.with_suffix(".so").name
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}
