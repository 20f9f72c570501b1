"""State of a pipeline: one JSON file in its work folder, replaced whole at every change, that any process may read."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from stillhouse.client.core.errors import file_errors, usage_error
from stillhouse.protos.files.atomic import write_atomic
from stillhouse.protos.files.locks import is_locked

STATE_FILE = "pipeline.json"
LOCK_FILE = ".pipeline.lock"
FORMAT = 1


class StageState(StrEnum):
    """State of a stage."""

    WAITING = "WAITING"
    RUNNING = "RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"


@dataclass(kw_only=True, slots=True)
class StageRecord:
    """A stage's last try."""

    state: StageState = StageState.WAITING
    fingerprint: str = ""
    """SHA-256 of what the stage does and of the content of its inputs."""
    request_id: str = ""
    """Makes the creation of a run repeatable: written before the run is created."""
    run: str = ""
    """Id of a run stage's run."""
    started_at: float = 0.0
    """Seconds since the epoch."""
    ended_at: float = 0.0
    """Seconds since the epoch; 0 while it runs."""
    error: str = ""
    """Sentence of a failed stage."""
    outputs: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each output by name, once the stage is done."""


class PipelineState:
    """The records of all stages, by stage id."""

    def __init__(self, work: Path, file: Path) -> None:
        """`work` is the work folder of the pipeline in `file`."""
        self.path = work / STATE_FILE
        self.file = file
        self.records: dict[str, StageRecord] = {}

    @property
    def lock_path(self) -> Path:
        """File that a process locks while it runs the pipeline."""
        return self.path.parent / LOCK_FILE

    @property
    def is_running(self) -> bool:
        """True while a process runs the pipeline."""
        return is_locked(self.lock_path)

    def record(self, stage_id: str) -> StageRecord:
        """The record of a stage, new for one that was never tried."""
        return self.records.setdefault(stage_id, StageRecord())

    def load(self) -> PipelineState:
        """Reads the file, if there is one; returns itself. Raises StillhouseError for the state of another pipeline file."""
        with file_errors("read", self.path):
            content = self.path.read_bytes() if self.path.exists() else b""
        if not content:
            self.records = {}
            return self
        try:
            document = json.loads(content)
            self.records = _records(document)
            other = Path(self.path.parent, document.get("file", ""))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise usage_error(
                f"{self.path} is no state of a pipeline ({error}); move it away to start from the first stage."
            ) from error
        # A file that has another name by now is still the same pipeline; one that stands beside this is not.
        if other.is_file() and self.file.exists() and not other.samefile(self.file):
            raise usage_error(
                f"{self.path.parent} holds the stages of {other.resolve()}; give {self.file} another `work` folder."
            )
        return self

    def save(self) -> None:
        """Writes the file."""
        document = {
            "format": FORMAT,
            "file": os.path.relpath(self.file.resolve(), self.path.parent.resolve()),
            "stages": {name: asdict(each) for name, each in self.records.items()},
        }
        with file_errors("write", self.path):
            write_atomic(self.path, (json.dumps(document, indent=1) + "\n").encode())


def _records(document: Mapping[str, Any]) -> dict[str, StageRecord]:
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']}, where this client knows {FORMAT}")
    known = {each.name for each in fields(StageRecord)}
    found = {}
    for name, values in document["stages"].items():
        record = StageRecord(**{key: value for key, value in values.items() if key in known})
        record.state = StageState(record.state)
        found[str(name)] = record
    return found
