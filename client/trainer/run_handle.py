"""One run of a trainer: watch, stop, read metrics and logs, download artifacts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stillhouse.client.core.connection import PATIENCE_S, Connection, OnLost, resumed
from stillhouse.client.core.errors import file_errors
from stillhouse.client.runfile.load import parse_fields
from stillhouse.client.trainer.artifacts import OnFile, pull
from stillhouse.client.trainer.run_lookup import run_id
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import run_pb2
from stillhouse.protos.stillhouse.v1.run_pb2_grpc import RunServiceStub

ENDED = frozenset({run_pb2.Run.STATE_STOPPED, run_pb2.Run.STATE_COMPLETED, run_pb2.Run.STATE_FAILED})


@dataclass(frozen=True, kw_only=True, slots=True)
class Series:
    """One metric over time."""

    steps: NDArray[np.int64]
    """Optimizer steps, growing, [N]."""
    values: NDArray[np.float64]
    """Values, one for each step, [N]."""


class RunHandle:
    """A run of a trainer by name, `runs/{run}`. Every method raises StillhouseError."""

    def __init__(self, trainer: Connection, name: str) -> None:
        self.name = name
        self._trainer = trainer
        self._stub = RunServiceStub(trainer.channel)

    def __repr__(self) -> str:
        return f"RunHandle({self.name!r} at {self._trainer.target})"

    @property
    def id(self) -> str:
        """12 characters of a-z and 2-7."""
        return run_id(self.name)

    def get(self) -> run_pb2.Run:
        """Returns the run's current state."""
        return self._trainer.call(self._stub.GetRun, run_pb2.GetRunRequest(name=self.name))

    def stop(self) -> run_pb2.Run:
        """Requests a checkpoint and a stop; returns the run as it is then, usually STOPPING."""
        return self._trainer.call(self._stub.StopRun, run_pb2.StopRunRequest(name=self.name))

    def resume(self, *changes: str) -> run_pb2.Run:
        """Queues the run again, from its last checkpoint, with `changes` such as "optimizer.micro_batch_tokens=2048".

        Raises RUN_STATE unless it is STOPPED or FAILED, and INVALID_SPEC for changes of what is learnt.
        """
        request = run_pb2.ResumeRunRequest(name=self.name)
        if changes:
            request.changes.CopyFrom(parse_fields({}, changes).spec)
        return self._trainer.call(self._stub.ResumeRun, request)

    def delete(self) -> None:
        """Deletes the run and its files. Raises RUN_STATE unless it has ended."""
        self._trainer.call(self._stub.DeleteRun, run_pb2.DeleteRunRequest(name=self.name))

    def watch(
        self, *, after_sequence: int = 0, on_lost: OnLost | None = None, patience_s: float = PATIENCE_S
    ) -> Iterator[run_pb2.WatchRunResponse]:
        """Yields the run, then its changes and every step's metrics until it ends.

        A lost stream is resumed after the last yielded sequence; `on_lost` is called.
        """
        last = after_sequence
        is_live = False

        def open_stream() -> Iterator[run_pb2.WatchRunResponse]:
            nonlocal is_live
            request = run_pb2.WatchRunRequest(name=self.name, after_sequence=last)
            for event in self._trainer.stream(self._stub.WatchRun, request):
                if event.WhichOneof("event") == "run":
                    is_live = event.run.state not in ENDED
                yield event
            if is_live:
                message = f"The trainer at {self._trainer.target} closed the stream of run {self.id}, which is still live."
                raise StillhouseError(Reason.SERVICE_UNREACHABLE, message)

        while True:
            try:
                for event in resumed(open_stream, on_lost=on_lost, patience_s=patience_s):
                    if event.sequence > last or last == 0:
                        last = event.sequence
                        yield event
            except StillhouseError as error:
                if error.reason is not Reason.CURSOR_EXPIRED or last == 0:
                    raise
                last = 0  # the events in between are gone; resume from the current state
            else:
                return

    def wait(self) -> run_pb2.Run:
        """Waits until the run has ended in any state, and returns it."""
        for event in self.watch():
            if event.WhichOneof("event") == "run" and event.run.state in ENDED:
                return event.run
        return self.get()

    def metrics(
        self, *keys: str, start_step: int = 0, end_step: int = 0, max_points: int = 0
    ) -> dict[str, Series]:
        """Returns each metric's history, thinned to `max_points` (0 means 1000) points.

        Without `keys` all metrics; steps in [start_step, end_step), where an end_step of 0 means no bound.
        """
        request = run_pb2.QueryMetricsRequest(
            name=self.name, keys=keys, start_step=start_step, end_step=end_step, max_points=max_points
        )
        return {
            series.key: Series(
                steps=np.array(series.steps, dtype=np.int64), values=np.array(series.values, dtype=np.float64)
            )
            for series in self._trainer.call(self._stub.QueryMetrics, request).series
        }

    def logs(
        self, *, follow: bool = False, attempt: int = 0, start_offset: int = 0, on_lost: OnLost | None = None
    ) -> Iterator[run_pb2.StreamLogsResponse]:
        """Yields the log as bytes from `start_offset`, negative from the end; of one attempt, or (0) of all.

        With `follow` it continues until the run ends. A lost stream is resumed where it broke.
        """
        offset = start_offset

        def open_stream() -> Iterator[run_pb2.StreamLogsResponse]:
            request = run_pb2.StreamLogsRequest(
                name=self.name, start_offset=offset, follow=follow, attempt=attempt
            )
            return self._trainer.stream(self._stub.StreamLogs, request)

        for chunk in resumed(open_stream, on_lost=on_lost):
            offset = chunk.next_offset
            yield chunk

    def artifacts(self) -> list[run_pb2.Artifact]:
        """Lists checkpoints, the final model and evaluation outputs."""
        answer = self._trainer.call(self._stub.ListArtifacts, run_pb2.ListArtifactsRequest(name=self.name))
        return list(answer.artifacts)

    def pull(
        self, what: str = "final", directory: Path | str | None = None, *, on_file: OnFile | None = None
    ) -> list[Path]:
        """Downloads `what`, a path of artifacts() or a directory of some, into `directory`, and returns the files.

        `directory` is `{run}/{what}` by default; paths below it are relative to `what`. One file is stored as `directory`
        itself unless that is a directory, or text that ends with "/". Of checkpoints the model is copied; a file that only a
        resume needs is copied by its own path. A broken download is resumed, a file that exists already is kept, and every
        file's SHA-256 is checked. Raises ARTIFACT_NOT_FOUND if nothing matches.
        """
        return pull(self.id, self.artifacts(), self.download, what, directory, on_file=on_file)

    def attach(self, path: Path | str) -> run_pb2.Artifact:
        """Stores the JSON file at `path`, a result that was computed elsewhere, with the run; returns it as an artifact.

        Raises INVALID_REQUEST for what is no JSON object, or too large.
        """
        path = Path(path)
        with file_errors("read", path):
            data = path.read_bytes()
        request = run_pb2.AttachResultRequest(name=self.name, file_name=path.name, data=data)
        return self._trainer.call(self._stub.AttachResult, request).artifact

    def download(self, path: str, start_offset: int) -> Iterator[run_pb2.DownloadArtifactResponse]:
        """Yields one artifact from a byte offset on; the last message carries the SHA-256 of the complete file."""
        request = run_pb2.DownloadArtifactRequest(name=self.name, path=path, start_offset=start_offset)
        return self._trainer.stream(self._stub.DownloadArtifact, request)
