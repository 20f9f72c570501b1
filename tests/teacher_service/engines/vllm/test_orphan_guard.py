"""Orphan guard: no process of a teacher outlives it, however it dies; a released guard kills nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import psutil
import pytest

from tests.support.processes import no_process_left

TEACHER = """
    import subprocess, sys, time
    from stillhouse.teacher_service.engines.vllm.orphan_guard import LOOK_INTERVAL_S, OrphanGuard
    guard = OrphanGuard()
    child = [sys.executable, "-c", "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); time.sleep(600)"]
    process = subprocess.Popen(child)
    time.sleep(4 * LOOK_INTERVAL_S)
    if sys.argv[1] == "release":
        guard.release()
    print("ready", process.pid, flush=True)
    time.sleep(600)
"""


def started(how: str, mark: dict[str, str]) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """Starts a teacher and two generations of children, as vLLM's engine and worker are."""
    teacher = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(TEACHER), how],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **mark},
        start_new_session=True,
    )
    assert teacher.stdout is not None
    child = psutil.Process(int(teacher.stdout.readline().split()[1]))
    return teacher, [child, *child.children()]


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_children_and_grandchildren_end_with_the_teacher(end: signal.Signals) -> None:
    with no_process_left() as mark:
        teacher, children = started("stay", mark)
        assert len(children) == 2
        teacher.send_signal(end)
        teacher.communicate()
        gone, alive = psutil.wait_procs(children, timeout=60)
        assert len(gone) == 2, alive


def test_a_released_guard_ends_and_kills_nothing() -> None:
    with no_process_left() as mark:
        teacher, children = started("release", mark)
        commands = [" ".join(each.cmdline()) for each in psutil.Process(teacher.pid).children()]
        assert [command for command in commands if "orphan_guard" in command] == []
        teacher.kill()
        teacher.wait()
        _, alive = psutil.wait_procs(children, timeout=2)
        assert len(alive) == 2
        for child in children:
            child.kill()
        teacher.communicate()
