"""Run directory: the interface between run service and training process, and all that a run stores on disk.

Files are replaced atomically; the two journals (events and metrics) are appended by lines, and a torn last line is
truncated when the next attempt opens them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

import psutil
from google.protobuf import json_format

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.files.atomic import sync_file, write_atomic
from stillhouse.protos.files.locks import is_locked, try_lock
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec

Journal = Literal["events.jsonl", "metrics.jsonl"]
EXIT_FAILED = 3
"""Exit code of a training process that wrote a `failed` event."""
EXIT_DISK_FULL = 5
"""Exit code of a training process that had no room for a `failed` event."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")
MANIFEST = "MANIFEST.json"
"""Last file of a checkpoint to be written: it marks the checkpoint complete."""
MAX_READ_BYTES = 8 * 2**20
"""Limit on a read of a journal; no line is longer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessRecord:
    """The current or last process of a run."""

    attempt: int
    pid: int
    start_time: str
    """Start time by `start_time_of`."""

    @property
    def alive(self) -> bool:
        """True if this process lives, and not a later one with the same pid."""
        try:
            same = start_time_of(self.pid) == self.start_time
            return same and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


@dataclass(frozen=True, kw_only=True, slots=True)
class Control:
    """Instructions of the service to a run: the attempt that may write, and a stop request."""

    attempt: int
    stop: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedRecord:
    """The end of training, by which a later attempt exports without the data."""

    step: int
    """Step of the checkpoint that is exported."""
    end_ids: tuple[int, ...]
    """Ids that end the student's texts."""
    last_step: int
    """Steps taken; more than `step` if an earlier checkpoint was the best."""
    class_names: tuple[str, ...] = ()
    """Names of the classes, if the student is a classifier."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TrainedRecord:
        """The record that `dataclasses.asdict` made a value of; those of earlier versions have no last_step and no classes."""
        step, names = int(value["step"]), tuple(value.get("class_names", ()))
        last = int(value.get("last_step", step))
        return cls(step=step, end_ids=tuple(value["end_ids"]), last_step=last, class_names=names)


@dataclass(frozen=True, slots=True)
class RunDir:
    """The directory of one run."""

    path: Path

    @classmethod
    def create(cls, path: Path, spec: RunSpec, effective: RunSpec) -> RunDir:
        """Creates a run directory with both specs; an existing one keeps its other files."""
        run_dir = cls(path)
        for folder in (run_dir.attempts_path, run_dir.checkpoints_path):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomic(run_dir.spec_path, _spec_json(spec))
        write_atomic(run_dir.effective_spec_path, _spec_json(effective))
        return run_dir

    @property
    def spec_path(self) -> Path:
        return self.path / "spec.json"

    @property
    def effective_spec_path(self) -> Path:
        return self.path / "effective_spec.json"

    @property
    def lock_path(self) -> Path:
        return self.path / "lock"

    @property
    def heartbeat_path(self) -> Path:
        return self.path / "heartbeat"

    @property
    def control_path(self) -> Path:
        return self.path / "control.json"

    @property
    def process_path(self) -> Path:
        return self.path / "process.json"

    @property
    def events_path(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def attempts_path(self) -> Path:
        return self.path / "attempts"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final_path(self) -> Path:
        return self.path / "final"

    @property
    def trained_path(self) -> Path:
        """Step of the checkpoint with which training ended; written once the last evaluation is done."""
        return self.path / "trained.json"

    @property
    def tensorboard_path(self) -> Path:
        return self.path / "tensorboard"

    @property
    def teacher_path(self) -> Path:
        """Identity of the teacher at the first attempt."""
        return self.path / "teacher.json"

    @property
    def eval_targets_path(self) -> Path:
        """Teacher targets of held-out rows."""
        return self.path / "eval_targets"

    def log_path(self, attempt: int) -> Path:
        """Standard output and error of an attempt's process."""
        return self.attempts_path / str(attempt) / "log"

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints_path / str(step)

    def spec(self) -> RunSpec:
        """The spec as the user wrote it. Raises StillhouseError as `effective_spec` does."""
        return _read_spec(self.spec_path)

    def effective_spec(self) -> RunSpec:
        """The spec that training uses.

        Raises:
            StillhouseError: INVALID_SPEC if the file is missing or not a RunSpec.
        """
        spec = _read_spec(self.effective_spec_path)
        # Every field is set but those that are newer than the run: its text had no end.
        if not spec.data.HasField("end_text"):
            spec.data.end_text = False
        return spec

    def write_effective_spec(self, effective: RunSpec) -> None:
        """Replaces the spec that training uses, if it is another one, as after a resume with changes, or once `auto` is settled."""
        content = _spec_json(effective)
        if self.effective_spec_path.read_bytes() != content:
            write_atomic(self.effective_spec_path, content)

    def checkpoints(self) -> list[int]:
        """Steps of the complete checkpoints, ascending: those with a manifest, which is written last."""
        if not self.checkpoints_path.is_dir():
            return []
        names = (entry.name for entry in self.checkpoints_path.iterdir() if (entry / MANIFEST).is_file())
        return sorted(int(name) for name in names if name.isdecimal())

    def trained(self) -> TrainedRecord | None:
        """The end of training, if only the export is left; its checkpoint may be gone."""
        value = _read_json(self.trained_path)
        return TrainedRecord.from_json(value) if value else None

    def control(self) -> Control | None:
        """The service's last instructions; None before the first attempt."""
        value = _read_json(self.control_path)
        return Control(attempt=int(value["attempt"]), stop=bool(value["stop"])) if value else None

    def write_control(self, attempt: int, *, stop: bool) -> None:
        """Allows only `attempt` to write, and requests a stop if `stop`."""
        write_atomic(self.control_path, json.dumps({"attempt": attempt, "stop": stop}).encode())

    def request_stop(self) -> None:
        """Asks the current attempt to save a checkpoint and exit."""
        control = self.control()
        if control is not None:
            self.write_control(control.attempt, stop=True)

    def process(self) -> ProcessRecord | None:
        """The last process that opened the run, dead or alive."""
        value = _read_json(self.process_path)
        if not value:
            return None
        return ProcessRecord(
            attempt=int(value["attempt"]), pid=int(value["pid"]), start_time=str(value["start_time"])
        )

    def locked_by_live_process(self) -> ProcessRecord | None:
        """The run's live process; None unless the lock is held and its record matches a live process."""
        record = self.process()
        return record if record and record.alive and is_locked(self.lock_path) else None

    def read_lines(self, name: Journal, offset: int) -> tuple[list[dict[str, Any]], int]:
        """The complete lines of a journal from byte `offset`, and the offset after them.

        Lines that are not objects are skipped. Reads at most MAX_READ_BYTES: call again until the offset stays.
        """
        try:
            with (self.path / name).open("rb") as file:
                file.seek(offset)
                data = file.read(MAX_READ_BYTES)
        except FileNotFoundError:
            return [], offset
        end = data.rfind(b"\n") + 1
        return [
            value for value in map(_parse_line, data[:end].splitlines()) if value is not None
        ], offset + end

    @contextlib.contextmanager
    def open_attempt(self, attempt: int) -> Iterator[Attempt]:
        """Opens the run for its training process; holds the lock until the block ends.

        Raises:
            StillhouseError: RUN_STATE if another process holds the run, or the service has assigned it to another attempt.
        """
        lock = try_lock(self.lock_path)
        if lock is None:
            raise StillhouseError(
                Reason.RUN_STATE,
                f"{self.path} is locked by another process; stop it before attempt {attempt}.",
            )
        with lock:
            record = {"attempt": attempt, "pid": os.getpid(), "start_time": start_time_of(os.getpid())}
            opened = Attempt(self, attempt)
            opened.check_fence()
            write_atomic(self.process_path, json.dumps(record).encode())
            opened.cut_torn_lines()
            yield opened


class Attempt:
    """A process's exclusive access to a run: only it writes the journals."""

    writes = True
    """True if this process writes the run directory."""

    def __init__(self, run_dir: RunDir, number: int) -> None:
        self.run_dir = run_dir
        self.number = number
        self._sequences: dict[Journal, int] = {"events.jsonl": 0, "metrics.jsonl": 0}

    @property
    def stop_requested(self) -> bool:
        """True if the service asked this attempt to stop, or assigned the run to another one."""
        control = self.run_dir.control()
        return control is not None and (control.stop or control.attempt != self.number)

    def check_fence(self) -> None:
        """Checks that this attempt may write; call it before every rename.

        Raises:
            StillhouseError: RUN_STATE if the service has assigned the run to another attempt.
        """
        control = self.run_dir.control()
        if control is not None and control.attempt != self.number:
            raise StillhouseError(
                Reason.RUN_STATE,
                f"attempt {self.number} of {self.run_dir.path.name} was replaced by attempt {control.attempt}; it exits.",
            )

    def heartbeat(self) -> None:
        """Touches the heartbeat file."""
        self.run_dir.heartbeat_path.touch()

    def report(self, kind: str, **payload: Any) -> None:
        """Appends an event; it is on disk when this returns. Raises as `check_fence` does."""
        self._append("events.jsonl", {"kind": kind, **payload}, sync=True)

    def report_metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Appends the metrics of a step."""
        self._append("metrics.jsonl", {"step": step, "values": dict(values)}, sync=False)

    def mark_trained(self, record: TrainedRecord) -> None:
        """Records that training ended. Raises as `check_fence` does."""
        self.check_fence()
        write_atomic(self.run_dir.trained_path, json.dumps(dataclasses.asdict(record)).encode())

    def cut_torn_lines(self) -> None:
        """Truncates the partial line of a killed process, and continues the sequence after the last complete line."""
        for name in self._sequences:
            path = self.run_dir.path / name
            with path.open("ab+") as file:
                file.seek(0)
                data = file.read()
                end = data.rfind(b"\n") + 1
                if end < len(data):
                    file.truncate(end)
                    sync_file(file)
            lines = [value for value in map(_parse_line, data[:end].splitlines()) if value is not None]
            self._sequences[name] = max((int(line["sequence"]) for line in lines), default=0)

    def _append(self, name: Journal, value: dict[str, Any], *, sync: bool) -> None:
        self.check_fence()
        self._sequences[name] += 1
        head = {"sequence": self._sequences[name], "attempt": self.number, "time": now_text()}
        line = json.dumps({**head, **value}, separators=(",", ":")).encode() + b"\n"
        descriptor = os.open(self.run_dir.path / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            whole = os.fstat(descriptor).st_size
            if os.write(descriptor, line) != len(line):
                os.ftruncate(descriptor, whole)  # half a line would corrupt the next one
                raise OSError(errno.ENOSPC, f"the disk took only part of a line of {name}")
            if sync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def start_time_of(pid: int) -> str:
    """Start time of a process: boot id and ticks since boot, which no clock change affects.

    Raises:
        psutil.NoSuchProcess: there is no such process.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return f"{_BOOT.read_text().strip()} {fields[19]}"
    except (FileNotFoundError, ProcessLookupError):
        return str(psutil.Process(pid).create_time())  # not Linux, or no such process


def now_text() -> str:
    """The time in UTC as RFC 3339, with milliseconds."""
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _spec_json(spec: RunSpec) -> bytes:
    text = json_format.MessageToJson(spec, preserving_proto_field_name=True)
    return text.encode() + b"\n"


def _read_spec(path: Path) -> RunSpec:
    try:
        return json_format.Parse(path.read_bytes(), RunSpec())
    except (OSError, ValueError, json_format.ParseError) as error:
        raise StillhouseError(
            Reason.INVALID_SPEC, f"{path} is not a run specification: {error}. Create the run again."
        ) from error


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        return cast("dict[str, Any]", json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None


def _parse_line(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) and isinstance(value.get("sequence"), int) else None
