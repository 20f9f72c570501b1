"""File locks: one holder at a time, released when it closes the file or dies."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

from stillhouse.protos.files.locks import directory_lock, is_locked, try_lock

HOLDER = """
import sys
from pathlib import Path
from stillhouse.protos.files.locks import try_lock
lock = try_lock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_second_holder_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_locked(path)
    first = try_lock(path)
    assert first is not None
    assert try_lock(path) is None
    assert is_locked(path)
    first.close()
    assert not is_locked(path)


def test_a_killed_holder_releases_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        assert try_lock(path) is None
        holder.kill()
        holder.wait()
        lock = try_lock(path)
        assert lock is not None
        lock.close()


def test_a_directory_lock_makes_the_second_holder_wait(tmp_path: Path) -> None:
    order: list[str] = []
    entered = threading.Event()

    def second() -> None:
        entered.set()
        with directory_lock(tmp_path):
            order.append("second")

    with directory_lock(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
