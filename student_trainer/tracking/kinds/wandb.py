"""Weights & Biases; without a server `wandb sync` sends the run's folder later."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from stillhouse.student_trainer.tracking.tracker import Point, Table, TrackedRun

os.environ.update(WANDB_ERROR_REPORTING="false", WANDB_SILENT="true")  # read at import

import wandb

MAX_TAG_CHARACTERS = 64
_EXIT_CODES = {"FAILED": 1}


class Wandb:
    """A run of wandb, whose id is that of the run here."""

    repeats_safely = False

    def __init__(self) -> None:
        self._run: Any = None

    def open(self, run: TrackedRun, known: str) -> str:
        """Begins or resumes the run."""
        tracker = run.tracker
        self._run = wandb.init(
            id=known or run.id,
            resume="allow",
            mode="online" if tracker.is_online else "offline",
            dir=str(run.folder),
            project=tracker.project,
            entity=tracker.entity or None,
            name=run.name,
            config=dict(run.settings),
            tags=[f"{name}:{value}"[:MAX_TAG_CHARACTERS] for name, value in sorted(run.labels.items())],
            settings=wandb.Settings(
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_stats=True,
                x_disable_meta=True,
                x_save_requirements=False,
            ),
        )
        return str(self._run.id)

    def log(self, points: Sequence[Point]) -> None:
        """Adds points; wandb joins those of one step."""
        for point in points:
            self._run.log({**point.values, "_timestamp": point.time_ms / 1000}, step=point.step)

    def add_table(self, table: Table) -> None:
        """Adds a table to the step's history."""
        data = [list(row) for row in table.rows]
        self._run.log(
            {table.key: wandb.Table(columns=list(table.columns), data=data, allow_mixed_types=True)},
            step=table.step,
        )

    def add_links(self, links: Mapping[str, str]) -> None:
        """Adds them to the summary."""
        self._run.summary.update(dict(links))

    def close(self, state: str) -> None:
        """Ends the process's part of the run; a run that goes on is resumed later."""
        self._run.finish(exit_code=_EXIT_CODES.get(state, 0))


def make() -> Wandb:
    """A new tracker."""
    return Wandb()
