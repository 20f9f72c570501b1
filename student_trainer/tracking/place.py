"""The place that a tracker has reached in its run, in a file beside the tracker's own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from stillhouse.protos.files.atomic import write_atomic


@dataclass(kw_only=True, slots=True)
class Place:
    """The part that the tracker has got; a later process goes on from here."""

    id: str = ""
    """Id of the tracker's run; empty before it was opened."""
    offset: int = 0
    """Bytes of the run's metrics that were read."""
    step: int = -1
    """Highest step that was sent."""
    names: list[str] = field(default_factory=list)
    """Metrics of that step that were sent."""
    pending: bool = False
    """True while points up to here are sent: a process that dies then leaves open if they arrived."""
    tables: dict[str, str] = field(default_factory=dict)
    """Digest of each table that was sent, by its file."""
    ended: str = ""
    """State with which the tracker's run was closed; empty while it is open."""

    @classmethod
    def load(cls, path: Path) -> Place:
        """The place in the file at `path`; the beginning if there is none. Raises OSError and ValueError."""
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return cls()
        except TypeError as error:
            raise ValueError(f"{path} is no place of a tracker: {error}") from error

    def save(self, path: Path) -> None:
        """Replaces the file at `path`. Raises OSError."""
        write_atomic(path, json.dumps(asdict(self)).encode() + b"\n")
