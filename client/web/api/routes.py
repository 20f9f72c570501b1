"""Table of the routes: path and method of every rpc, below /api/v1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PREFIX = "/api/v1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Route:
    """One rpc as a method of a path."""

    rpc: str
    """Such as "RunService.GetRun"."""
    method: str
    path: str
    """Below PREFIX, with parameters in braces; {name:path} spans slashes."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Fields of the request that the path gives, as templates of its parameters."""
    takes_body: bool = False
    """True if the other fields are a JSON object; else they are the query."""
    status: int = 200
    timeout_s: float = 60.0

    @property
    def service(self) -> str:
        """Name of the service."""
        return self.rpc.partition(".")[0]

    @property
    def name(self) -> str:
        """Name of the rpc in it."""
        return self.rpc.partition(".")[2]


_RUN, _DATASET = {"name": "runs/{run}"}, {"name": "datasets/{dataset}"}

ROUTES: tuple[Route, ...] = (
    Route(rpc="RunService.CreateRun", method="POST", path="/runs", takes_body=True, status=201),
    Route(rpc="RunService.ListRuns", method="GET", path="/runs"),
    Route(rpc="RunService.StopRun", method="POST", path="/runs/{run}:stop", fields=_RUN),
    Route(rpc="RunService.ResumeRun", method="POST", path="/runs/{run}:resume", fields=_RUN, takes_body=True),
    Route(rpc="RunService.GetRun", method="GET", path="/runs/{run}", fields=_RUN),
    Route(rpc="RunService.DeleteRun", method="DELETE", path="/runs/{run}", fields=_RUN, status=204),
    Route(rpc="RunService.WatchRun", method="GET", path="/runs/{run}/events", fields=_RUN),
    Route(rpc="RunService.StreamLogs", method="GET", path="/runs/{run}/logs", fields=_RUN),
    Route(rpc="RunService.QueryMetrics", method="GET", path="/runs/{run}/metrics", fields=_RUN),
    Route(rpc="RunService.ListArtifacts", method="GET", path="/runs/{run}/artifacts", fields=_RUN),
    Route(
        rpc="RunService.DownloadArtifact",
        method="GET",
        path="/runs/{run}/artifacts/{path:path}",
        fields={**_RUN, "path": "{path}"},
    ),
    Route(
        rpc="RunService.AttachResult",
        method="PUT",
        path="/runs/{run}/results/{file_name}",
        fields={**_RUN, "file_name": "{file_name}"},
    ),
    Route(rpc="RunService.UploadDataset", method="POST", path="/datasets", status=201),
    Route(rpc="RunService.ListDatasets", method="GET", path="/datasets"),
    Route(rpc="RunService.GetDataset", method="GET", path="/datasets/{dataset}", fields=_DATASET),
    Route(
        rpc="RunService.DeleteDataset",
        method="DELETE",
        path="/datasets/{dataset}",
        fields=_DATASET,
        status=204,
    ),
    Route(
        rpc="RunService.InspectRows", method="POST", path="/rows:inspect", takes_body=True, timeout_s=600.0
    ),
    Route(
        rpc="RunService.InspectDataset",
        method="POST",
        path="/datasets:inspect",
        takes_body=True,
        timeout_s=600.0,
    ),
    Route(rpc="RunService.InspectStudent", method="POST", path="/students:inspect", takes_body=True),
    Route(rpc="TeacherService.GetTeacherInfo", method="GET", path="/teachers/{teacher}"),
    Route(
        rpc="TeacherService.LoadAdapter",
        method="POST",
        path="/teachers/{teacher}/adapters",
        takes_body=True,
        timeout_s=600.0,
    ),
    Route(
        rpc="TeacherService.UnloadAdapter",
        method="DELETE",
        path="/teachers/{teacher}/adapters/{adapter:path}",
        fields={"adapter": "{adapter}"},
        status=204,
        timeout_s=600.0,
    ),
)
"""In the order in which they are tried."""
