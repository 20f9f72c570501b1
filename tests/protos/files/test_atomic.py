"""Atomic files: the old content or the new one, whenever the writer ends."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.protos.files.atomic import atomic_writer, write_atomic
from tests.support.privileges import disk_of

KILLED_BEFORE_RENAME = """
import os, signal, sys
from pathlib import Path
from stillhouse.protos.files.atomic import atomic_writer, sync_file
with atomic_writer(Path(sys.argv[1])) as file:
    file.write(b"new")
    sync_file(file)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_crash_between_write_and_rename_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    done = subprocess.run([sys.executable, "-c", KILLED_BEFORE_RENAME, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"old"
    write_atomic(path, b"newer")
    assert path.read_bytes() == b"newer"


def test_a_full_disk_names_the_file_and_leaves_it(tmp_path: Path) -> None:
    with disk_of(tmp_path / "disk", 1 << 20) as disk:
        path = disk / "file"
        write_atomic(path, b"old")
        with pytest.raises(OSError, match="No space left on device") as full:
            write_atomic(path, bytes(1 << 21))
        assert full.value.filename == str(path)
        assert (path.read_bytes(), len(list(disk.iterdir()))) == (b"old", 1)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "text")  # type: ignore[arg-type]
    with pytest.raises(TypeError), atomic_writer(path) as file:
        file.writelines([b"half", "text"])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_private_file_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch(0o644)
    write_atomic(path, b"secret", private=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "null").symlink_to("/dev/null")
    with (tmp_path / "open").open("w") as file:
        # As /dev/stdout is, behind `> open`.
        (tmp_path / "stdout").symlink_to(f"/proc/{os.getpid()}/fd/{file.fileno()}")
        for name, what in (("pipe", "a pipe"), ("null", "a device"), ("stdout", "a link to an open file")):
            with pytest.raises(FileExistsError, match=f"it is {what}, which a file would replace"):
                write_atomic(tmp_path / name, b"new")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["null", "open", "pipe", "stdout"]
        assert (tmp_path / "pipe").is_fifo()
        assert (tmp_path / "null").is_symlink()
