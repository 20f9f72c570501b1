"""The attempt as ranks other than 0 see it: read-only; rank 0 reports for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse.student_trainer.run_dir import Attempt, RunDir


class Follower(Attempt):
    """An attempt in a process of another rank than 0; it writes nothing."""

    writes = False

    @classmethod
    def open(cls, run_dir: RunDir, number: int) -> Follower:
        """Opens the attempt of the first process.

        Raises:
            StillhouseError: RUN_STATE if the service has given the run to another attempt.
        """
        follower = cls(run_dir, number)
        follower.check_fence()
        return follower

    def heartbeat(self) -> None:
        """Does nothing."""

    def report(self, kind: str, **payload: Any) -> None:
        """Does nothing."""

    def report_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Does nothing."""
