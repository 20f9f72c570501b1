"""Prepared folders appear whole, are shared, and go when nobody uses them: by age, then by size."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from stillhouse.student_trainer.prepared_store import PreparedStore

DAY_S = 86_400.0
MAX_BYTES = 1 << 30


def _put(store: PreparedStore, name: str, size: int = 100, *, days_ago: float = 0) -> None:
    with store.new_folder() as folder:
        (folder / "data").write_bytes(b"x" * size)
        store.put(folder, name, {"told": name})
    used = time.time() - days_ago * DAY_S
    os.utime(store.folder / name / "lock", (used, used))


def _names(store: PreparedStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir() if (path / "prepared.json").exists())


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    store = PreparedStore(tmp_path / "prepared")
    assert store.open("a") is None
    with store.new_folder() as folder:
        (folder / "data").write_bytes(b"half")
    assert list(store.folder.iterdir()) == []
    _put(store, "a")
    found = store.open("a")
    assert found is not None
    assert found.manifest["told"] == "a"
    assert (found.path / "data").read_bytes() == b"x" * 100
    found.close()
    (store.folder / "a" / "data").write_bytes(b"shorter")
    assert store.open("a") is None


def test_the_faster_of_two_processes_wins(tmp_path: Path) -> None:
    store = PreparedStore(tmp_path / "prepared")
    with store.new_folder() as slow:
        (slow / "data").write_bytes(b"slow")
        _put(store, "a", size=7)
        store.put(slow, "a", {})
    assert len(list(store.folder.iterdir())) == 1
    assert (store.folder / "a" / "data").stat().st_size == 7
    with store.turn("a") as first, store.turn("a") as second:
        assert (first, second) == (True, False)


def test_age_and_then_size_decide_what_goes(tmp_path: Path) -> None:
    store = PreparedStore(tmp_path / "prepared")
    for name, days in (("new", 0), ("used", 2), ("older", 3), ("old", 31)):
        _put(store, name, size=1000, days_ago=days)
    assert store.clean(max_bytes=MAX_BYTES, keep_days=30.0) > 1000
    assert _names(store) == ["new", "older", "used"]
    opened = store.open("older")
    assert opened is not None
    opened.close()
    # It was used a moment ago, so that "used" is the one that was not used for longest.
    store.clean(max_bytes=2500, keep_days=30)
    assert _names(store) == ["new", "older"]


def test_what_a_process_holds_stays(tmp_path: Path) -> None:
    store = PreparedStore(tmp_path / "prepared")
    _put(store, "a", days_ago=40)
    held = store.open("a")
    assert held is not None
    os.utime(held.path / "lock", (0, 0))
    with store.new_folder() as folder:
        store.clean(max_bytes=0, keep_days=0)
        assert folder.exists()
    assert _names(store) == ["a"]
    held.close()
    assert store.clean(max_bytes=0, keep_days=0) > 0
    assert list(store.folder.iterdir()) == []


def test_a_sweep_at_any_moment_spares_a_new_folder(tmp_path: Path) -> None:
    """A child sweeps whenever it opens or renames a file, and so between any two steps."""
    store = PreparedStore(tmp_path / "prepared")
    child = os.fork()
    if child == 0:
        is_sweeping = False

        def sweep(event: str, _: object) -> None:
            nonlocal is_sweeping
            if event in ("open", "os.rename", "os.mkdir") and not is_sweeping:
                is_sweeping = True
                store.clean(max_bytes=0, keep_days=0)
                is_sweeping = False

        sys.addaudithook(sweep)
        try:
            with store.new_folder() as folder:
                (folder / "data").write_bytes(b"whole")
                os._exit(0 if (folder / "lock").exists() else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_no_other_run_finds_goes_with_its_last_reader(tmp_path: Path) -> None:
    store = PreparedStore(tmp_path / "prepared")
    for name in ("own-1", "own-2", "a"):
        _put(store, name)
    held = store.open("own-2")
    assert held is not None
    assert store.clean(max_bytes=MAX_BYTES, keep_days=30.0) == 0
    assert _names(store) == ["a", "own-2"]
    held.close()


def test_what_a_killed_process_left_is_removed_and_never_read(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib\n"
        "from stillhouse.student_trainer.prepared_store import PreparedStore\n"
        "store = PreparedStore(pathlib.Path(sys.argv[1]))\n"
        "with store.turn('a'), store.new_folder() as folder:\n"
        "    (folder / 'data').write_bytes(b'half')\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    folder = tmp_path / "prepared"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        store = PreparedStore(folder)
        store.clean(max_bytes=MAX_BYTES, keep_days=30.0)
        assert len(list(folder.glob(".new-*"))) == 1
        with store.turn("a") as mine:
            assert not mine
        process.send_signal(signal.SIGKILL)
    assert store.open("a") is None
    with store.turn("a") as mine:
        assert mine
    store.clean(max_bytes=MAX_BYTES, keep_days=30.0)
    assert not list(folder.glob(".new-*"))
