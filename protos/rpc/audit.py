"""Audit log: one JSON line for each call that changed or downloaded data, or was refused; no tokens, no request bodies."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rpc.auth import SCOPES
from stillhouse.protos.rpc.tokens import Scope
from stillhouse.protos.telemetry.call_record import OK, CallRecord

MAX_BYTES = 64 * 2**20
"""A larger file is renamed to *.1, replacing the previous one: at most two files exist."""
READS = frozenset(
    f"/stillhouse.v1.{name}"
    for name in (
        "TeacherService/GetTeacherInfo",
        "TeacherService/GetTokenizer",
        "RunService/GetRun",
        "RunService/ListRuns",
        "RunService/ListDatasets",
        "RunService/GetDataset",
        "RunService/WatchRun",
        "RunService/QueryMetrics",
        "RunService/ListArtifacts",
        "RunService/StreamLogs",
    )
)
"""Calls logged only if refused, since clients poll them."""
DENIALS = frozenset({Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED, Reason.PATH_NOT_ALLOWED, Reason.QUOTA})

log = structlog.get_logger(__name__)


class AuditLog:
    """Call observer that appends to a file readable by its owner only."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES) -> None:
        """Raises StillhouseError(INVALID_CONFIG) if the file cannot be written."""
        self._path = path
        self._max_bytes = max_bytes
        try:
            self._append(b"")
        except OSError as error:
            raise StillhouseError(
                Reason.INVALID_CONFIG,
                f"The audit log {path} cannot be written ({error.strerror}); give a writable file.",
            ) from error

    def __call__(self, call: CallRecord) -> None:
        """Logs the call. A full disk costs the line, not the call."""
        if call.method in READS and call.outcome not in DENIALS:
            return
        line = {
            "ts": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "who": call.caller.name or "anybody",
            "peer": call.peer,
            "rpc": call.method.rpartition(".")[2],
            "what": call.what,
            "outcome": call.outcome,
            "allowed": call.outcome not in DENIALS,
            "admin": SCOPES.get(call.method) is Scope.ADMIN,
            "seconds": round(call.seconds, 3),
        }
        try:
            self._append(json.dumps(line, ensure_ascii=True).encode() + b"\n")
        except OSError as error:
            log.warning("audit line lost", why=str(error), ok=call.outcome == OK)

    def _append(self, data: bytes) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            if os.fstat(descriptor).st_size + len(data) > self._max_bytes:
                os.close(descriptor)
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(descriptor, data)
        finally:
            os.close(descriptor)
