"""Trackio; without a server it writes its SQLite files into the run's folder, which `trackio show` reads (TRACKIO_DIR)."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from stillhouse.student_trainer.tracking.tracker import Point, Table, TrackedRun


class Trackio:
    """A run of Trackio, which knows runs by their names."""

    repeats_safely = False

    def __init__(self) -> None:
        self._trackio: Any = None
        self._run: Any = None

    def open(self, run: TrackedRun, known: str) -> str:
        """Begins or resumes the run."""
        os.environ["TRACKIO_DIR"] = str(run.folder)  # read at import
        self._trackio = importlib.import_module("trackio")
        name = known or (run.name if run.name == run.id else f"{run.name} {run.id}")
        server = run.tracker.uri or os.environ.get("TRACKIO_SERVER_URL")
        self._run = self._trackio.init(
            project=run.tracker.project,
            name=name,
            server_url=server if run.tracker.is_online else None,
            config={**run.settings, "labels": dict(run.labels)},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        return name

    def log(self, points: Sequence[Point]) -> None:
        """Adds points."""
        for point in points:
            self._run.log(dict(point.values), step=point.step)

    def add_table(self, table: Table) -> None:
        """Adds a table to the step."""
        rows = [list(row) for row in table.rows]
        self._run.log(
            {table.key: self._trackio.Table(columns=list(table.columns), data=rows)}, step=table.step
        )

    def add_links(self, links: Mapping[str, str]) -> None:
        """Adds them as a table: a run's configuration is that of its begin."""
        rows = [[name, value] for name, value in links.items()]
        self._run.log({"final_model": self._trackio.Table(columns=["what", "where"], data=rows)})

    def close(self, state: str) -> None:  # noqa: ARG002 - Trackio's runs have no states of this kind
        """Sends what waits."""
        self._trackio.finish()


def make() -> Trackio:
    """A new tracker. Raises ImportError."""
    if find_spec("trackio") is None:
        raise ModuleNotFoundError("No module named 'trackio'")
    return Trackio()
