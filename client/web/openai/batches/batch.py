"""One batch of OpenAI's API: its record on disk and its document."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from stillhouse.protos.files.atomic import write_atomic

PREFIX = "batch_"
ENDED = frozenset({"failed", "completed", "expired", "cancelled"})
_RECORD = "batch.json"
_TIMES = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
MAX_ERRORS = 100


@dataclass(kw_only=True, slots=True)
class Batch:
    """A batch; `save` after every change."""

    id: str
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    created_at: int
    """Seconds since 1970."""
    expires_at: int
    """Time at which it ends with what is done."""
    metadata: dict[str, str] | None = None
    status: str = "validating"
    model: str = ""
    """Model of its rows; empty before they were looked at."""
    times: dict[str, int] = field(default_factory=dict)
    """Time at which it had each status."""
    total: int = 0
    completed: int = 0
    failed: int = 0
    """Rows."""
    errors: list[dict[str, Any]] = field(default_factory=list)
    output_file_id: str | None = None
    error_file_id: str | None = None

    @property
    def has_ended(self) -> bool:
        """True if nothing of it changes any more."""
        return self.status in ENDED

    def enter(self, status: str) -> None:
        """Gives it another status, from now on."""
        self.status = status
        self.times[status] = int(time.time())

    def add_error(
        self, code: str, message: str, *, line: int | None = None, param: str | None = None
    ) -> None:
        """Adds an error of the whole batch, up to a limit."""
        if len(self.errors) < MAX_ERRORS:
            self.errors.append({"code": code, "message": message, "line": line, "param": param})

    def document(self) -> dict[str, Any]:
        """The batch as the API has it."""
        times = {f"{name}_at": self.times.get(name) for name in _TIMES}
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model or None,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            **times,
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata,
        }

    def save(self, folder: Path) -> None:
        """Replaces the record in the batch's folder. Raises OSError."""
        write_atomic(folder / _RECORD, json.dumps(asdict(self)).encode())

    @classmethod
    def load(cls, folder: Path) -> Batch:
        """The record in a batch's folder. Raises OSError, ValueError and TypeError."""
        values: Mapping[str, Any] = json.loads((folder / _RECORD).read_bytes())
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})
