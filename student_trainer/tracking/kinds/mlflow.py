"""MLflow; without a server it writes a SQLite store into the run's folder, which `mlflow ui --backend-store-uri` shows."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stillhouse.student_trainer.tracking.tracker import Point, Table, TrackedRun

os.environ.update(
    MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_HTTP_REQUEST_MAX_RETRIES="3", MLFLOW_HTTP_REQUEST_TIMEOUT="20"
)

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

AT_ONCE = 1000
"""Metrics of one request, the server's limit."""
PARAMS_AT_ONCE = 100
MAX_PARAM_CHARACTERS = 500
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]")
RUN_TAG = "stillhouse.run"
"""Tag with the id of the run here."""
_STATUSES = {"COMPLETED": "FINISHED", "FAILED": "FAILED", "STOPPED": "KILLED"}


class Mlflow:
    """A run of MLflow, found again by its tag."""

    repeats_safely = True  # its stores keep one metric of a key, time, step and value

    def __init__(self) -> None:
        self._client: Any = None
        self._id = ""
        self._tables: list[str] = []

    def open(self, run: TrackedRun, known: str) -> str:
        """Begins a run in the experiment of the project, or goes on with it."""
        uri, artifacts = run.tracker.uri or os.environ.get("MLFLOW_TRACKING_URI", ""), None
        if not run.tracker.is_online:
            uri = f"sqlite:///{run.folder}/mlflow.db"
            artifacts = (run.folder / "artifacts").as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(run.tracker.project, artifacts)
        found = known or self._find(experiment, run.id)
        if found:
            self._client.update_run(found, status="RUNNING", name=run.name)
        else:
            tags = {RUN_TAG: run.id, **{_name(f"label.{name}"): value for name, value in run.labels.items()}}
            found = self._client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
        self._id = str(found)
        self._add_settings(run.flat_settings())
        return self._id

    def log(self, points: Sequence[Point]) -> None:
        """Adds metrics with the times at which they were written."""
        metrics = [
            Metric(_name(name), value, point.time_ms, point.step)
            for point in points
            for name, value in point.values.items()
        ]
        for begin in range(0, len(metrics), AT_ONCE):
            self._client.log_batch(self._id, metrics=metrics[begin : begin + AT_ONCE])

    def add_table(self, table: Table) -> None:
        """Adds a table as an artifact that the page shows as such."""
        path = f"{table.key}.json"
        document = {"columns": list(table.columns), "data": [list(row) for row in table.rows]}
        self._client.log_dict(self._id, document, path)
        self._tables = [each for each in self._tables if each != path] + [path]
        shown = [{"path": each, "type": "table"} for each in self._tables]
        self._client.set_tag(self._id, "mlflow.loggedArtifacts", json.dumps(shown))

    def add_links(self, links: Mapping[str, str]) -> None:
        """Adds them as tags."""
        self._client.log_batch(self._id, tags=[RunTag(name, value) for name, value in links.items()])

    def close(self, state: str) -> None:
        """Ends the run, unless it goes on."""
        if state:
            self._client.set_terminated(self._id, status=_STATUSES[state])

    def _experiment(self, name: str, artifacts: str | None) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifact_location=artifacts))
            except MlflowException:  # another process made it meanwhile
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _find(self, experiment: str, run_id: str) -> str:
        """A run that a process made and did not live to note."""
        found = self._client.search_runs([experiment], f"tags.`{RUN_TAG}` = '{run_id}'", max_results=1)
        return str(found[0].info.run_id) if found else ""

    def _add_settings(self, settings: Mapping[str, str]) -> None:
        """Adds the settings; those of a resumed run that changed keep their first value, which MLflow does not change."""
        known = self._client.get_run(self._id).data.params
        params = [
            Param(name, value[:MAX_PARAM_CHARACTERS])
            for name, value in ((_name(path), value) for path, value in settings.items())
            if name not in known
        ]
        for begin in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=params[begin : begin + PARAMS_AT_ONCE])


def _name(path: str) -> str:
    """A name that MLflow takes: "teachers.0.targets" for "teachers[0].targets"."""
    return _NOT_IN_NAMES.sub("_", path.replace("[", ".").replace("]", ""))[:250]


def make() -> Mlflow:
    """A new tracker."""
    return Mlflow()
