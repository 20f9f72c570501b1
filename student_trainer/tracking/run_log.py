"""A log stream into the log of a run's current attempt, without secrets."""

from __future__ import annotations

import io
from collections.abc import Sequence

from stillhouse.student_trainer.run_dir import RunDir

MAX_BYTES = 64 * 1024
"""Limit of one process: the run's limit on logs is for its own."""


class RunLog(io.TextIOBase):
    """Appends whole lines. What comes before the attempt's own first line is dropped: it would tell of a process that is not
    there."""

    def __init__(self, run_dir: RunDir, secrets: Sequence[str]) -> None:
        self._run_dir, self._secrets = run_dir, secrets
        self._left = MAX_BYTES

    def write(self, text: str) -> int:
        """Writes `text` without secrets. Raises OSError."""
        control = self._run_dir.control()
        self._left -= len(text)
        if control is None or self._left < 0:
            return len(text)
        path = self._run_dir.log_path(control.attempt)
        if path.is_file() and path.stat().st_size:
            told = text
            for secret in self._secrets:
                told = told.replace(secret, "***")
            with path.open("ab") as file:
                file.write(told.encode(errors="replace"))
        return len(text)
