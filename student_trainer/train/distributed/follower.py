"""A run as the further processes of an attempt see it: they read it, and the first process speaks for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stillhouse.student_trainer.run_dir import Attempt, RunDir


class Follower(Attempt):
    """A further process of an attempt; it writes nothing."""

    writes = False

    @classmethod
    def of(cls, run_dir: RunDir, number: int) -> Follower:
        """The attempt that the first process holds.

        Raises:
            StillhouseError: RUN_STATE if the service has given the run to another attempt.
        """
        follower = cls(run_dir, number)
        follower.check_fence()
        return follower

    def heartbeat(self) -> None:
        """Nothing."""

    def report(self, kind: str, **payload: Any) -> None:
        """Nothing."""

    def report_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Nothing."""
