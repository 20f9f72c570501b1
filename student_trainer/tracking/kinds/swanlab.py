"""SwanLab; without a server `swanlab sync` sends the run's folder later."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stillhouse.student_trainer.tracking.tracker import Point, Table, TrackedRun

os.environ.setdefault("SWANLAB_CONFIG_DIR", str(Path.home()))  # read at import; there are no files

import swanlab

_STATES = {"FAILED": "crashed", "STOPPED": "aborted"}


class SwanLab:
    """An experiment of SwanLab, whose id is that of the run here."""

    repeats_safely = False

    def __init__(self) -> None:
        self._run: Any = None

    def open(self, run: TrackedRun, known: str) -> str:
        """Begins or resumes the experiment."""
        tracker = run.tracker
        found = known or run.id
        self._run = swanlab.init(
            id=found,
            resume="allow",
            mode="online" if tracker.is_online else "offline",
            log_dir=str(run.folder),
            project=tracker.project,
            workspace=tracker.entity or None,
            name=run.name,
            tags=[f"{name}:{value}" for name, value in sorted(run.labels.items())],
            config=dict(run.settings),
            settings=swanlab.Settings(
                interactive=False,
                terminal=swanlab.Settings.Terminal(proxy_type="none"),
                probe=swanlab.Settings.Probe(
                    hardware=False, runtime=False, requirements=False, conda=False, git=False, monitor=False
                ),
            ),
        )
        return found

    def log(self, points: Sequence[Point]) -> None:
        """Adds points."""
        for point in points:
            self._run.log(dict(point.values), step=point.step)

    def add_table(self, table: Table) -> None:
        """Adds a table to the step."""
        shown = swanlab.echarts.Table()
        shown.add(list(table.columns), [list(row) for row in table.rows])
        self._run.log({table.key: shown}, step=table.step)

    def add_links(self, links: Mapping[str, str]) -> None:
        """Adds them to the configuration."""
        self._run.config.update(dict(links))

    def close(self, state: str) -> None:
        """Ends the process's part of the experiment."""
        found = _STATES.get(state, "success")
        self._run.finish(state=found, error="the run failed" if found == "crashed" else None)


def make() -> SwanLab:
    """A new tracker."""
    return SwanLab()
