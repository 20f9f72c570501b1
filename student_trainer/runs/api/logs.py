"""A run's log: the logs of its attempts, concatenated."""

from __future__ import annotations

from stillhouse.student_trainer.run_dir import RunDir

PIECE_BYTES = 256 * 1024
"""Bytes of a log in one message."""


def attempts_with_log(run_dir: RunDir) -> list[int]:
    """Numbers of the attempts that have a log, ascending."""
    if not run_dir.attempts_path.is_dir():
        return []
    names = [entry.name for entry in run_dir.attempts_path.iterdir()]
    return sorted(int(name) for name in names if name.isdecimal() and run_dir.log_path(int(name)).is_file())


def size(run_dir: RunDir, attempt: int) -> int:
    """Size of the log in bytes, of one attempt or of all if `attempt` is 0."""
    return sum(run_dir.log_path(number).stat().st_size for number in _chosen(run_dir, attempt))


def read(run_dir: RunDir, attempt: int, offset: int) -> bytes:
    """Up to PIECE_BYTES from byte `offset`; empty at the end."""
    for number in _chosen(run_dir, attempt):
        path = run_dir.log_path(number)
        length = path.stat().st_size
        if offset < length:
            with path.open("rb") as file:
                file.seek(offset)
                return file.read(PIECE_BYTES)
        offset -= length
    return b""


def _chosen(run_dir: RunDir, attempt: int) -> list[int]:
    numbers = attempts_with_log(run_dir)
    return [number for number in numbers if attempt in (0, number)]
