"""A warm process takes the place of one that multiprocessing spawns, and only where it is the same."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from stillhouse.teacher_service.engines.vllm.worker.warm_start import Warm
from tests.support.programs import Program

PATIENCE_S = 60.0
SPAWN = multiprocessing.get_context("spawn")


def tell(connection: Connection, code: int) -> None:
    """Runs in the process: its facts, once the test has answered."""
    connection.send((os.getpid(), os.environ.get("WARM_TEST"), "colorsys" in sys.modules, os.getppid()))
    assert connection.recv() == "go on"
    sys.exit(code)


def spawned(code: int = 0) -> tuple[int, str | None, bool, int]:
    """Account of a spawned process of itself."""
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=tell, args=(theirs, code))
    process.start()
    theirs.close()
    assert ours.poll(PATIENCE_S)
    facts: tuple[int, str | None, bool, int] = ours.recv()
    assert facts[0] == process.pid
    assert process.is_alive()
    ours.send("go on")
    process.join(PATIENCE_S)
    assert process.exitcode == code
    return facts


def test_the_first_spawned_process_is_the_warm_one(monkeypatch: pytest.MonkeyPatch) -> None:
    warm = Warm(["colorsys"])
    pid = warm.pid
    monkeypatch.setenv("WARM_TEST", "set later")
    with warm.offered():
        assert spawned(7) == (pid, "set later", True, os.getpid())
        assert warm.used
        other, _, is_warm, _ = spawned()
        assert (other != pid, is_warm) == (True, False)
    assert not spawned()[2]


def test_another_environment_at_import_or_a_dead_process_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warm = Warm(["colorsys"])
    pid = warm.pid
    assert pid is not None
    with monkeypatch.context() as changed:
        changed.setenv("OMP_NUM_THREADS", "77")
        with warm.offered():
            assert spawned()[0] != pid
    assert not psutil.pid_exists(pid)

    warm = Warm(["colorsys", "no_such_module_at_all"])
    pid = warm.pid
    with warm.offered():
        assert spawned()[0] != pid
    assert not warm.used


def test_a_warm_process_keeps_what_transformers_reads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    warm = Warm(["transformers"])
    with warm.offered():
        spawned()
        assert warm.used
    assert len(list((tmp_path / "stillhouse" / "scans").iterdir())) == 2


@pytest.mark.model
@pytest.mark.slow
def test_the_engine_of_a_teacher_on_a_cpu_is_the_warm_process(vllm_teacher: Program) -> None:
    assert '"warm": true' in vllm_teacher.log(10**7)
    names = [each.name() for each in psutil.Process(vllm_teacher.pid).children()]
    assert "VLLM::EngineCore" in names  # by which it is found and ended


def test_a_warm_process_ends_with_the_one_that_started_it() -> None:
    program = (
        "import os, signal; from stillhouse.teacher_service.engines.vllm.worker.warm_start import Warm\n"
        "print(Warm(['time']).pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    warm = int(done.stdout)
    if psutil.pid_exists(warm):
        psutil.wait_procs([psutil.Process(warm)], timeout=PATIENCE_S)
    assert not psutil.pid_exists(warm)
