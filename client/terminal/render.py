"""Formats values for people: aligned columns, sizes, times; text from elsewhere without control characters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from google.protobuf.timestamp_pb2 import Timestamp

from stillhouse.client.core.json_output import as_json, enum_name
from stillhouse.protos.stillhouse.v1 import run_pb2

_STATES = run_pb2.Run.DESCRIPTOR.enum_types_by_name["State"]
_CONDITIONS = run_pb2.Run.DESCRIPTOR.enum_types_by_name["Condition"]
_KEPT = {"\n", "\t"}


def printable(text: str) -> str:
    """Escapes control characters in `text`, so that a model or a log cannot steer the terminal."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in _KEPT else _visible(each) for each in text)


def _visible(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii") if character != "\r" else ""


def columns(rows: Iterable[Sequence[str]], header: Sequence[str] = (), *, empty: str = "") -> str:
    """Aligns the cells of each column, two spaces apart; without rows the text is `empty`."""
    cells = [[printable(cell).replace("\n", " ") for cell in row] for row in rows]
    if not cells:
        return empty
    table = [list(header), *cells] if header else cells
    widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def state_name(run: run_pb2.Run) -> str:
    """Returns RUNNING, or "RUNNING, waiting for teacher" if something keeps the run from making progress."""
    state = enum_name(_STATES, run.state) or "UNKNOWN"
    condition = enum_name(_CONDITIONS, run.condition)
    if condition is not None:
        return f"{state}, {condition.lower().replace('_', ' ')}"
    return state


def progress_text(progress: run_pb2.Progress) -> str:
    """Returns "120/500 24 %", or the step alone while the total is unknown."""
    if not progress.total_steps:
        return str(progress.step)
    share = 100 * progress.step / progress.total_steps
    return f"{progress.step}/{progress.total_steps} {share:.0f} %"


def number_text(value: float) -> str:
    """Formats a metric's value in at most five significant digits."""
    if not math.isfinite(value):
        return str(value)
    if value and abs(value) < 1e-3:
        return f"{value:.3e}"
    if abs(value) >= 1e5:
        return f"{value:,.0f}"
    return f"{value:.5g}"


def size_text(size_bytes: int) -> str:
    """Formats a size, e.g. 1.5 MiB."""
    size, units = float(size_bytes), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


def time_text(time: Timestamp) -> str:
    """Formats local time to the second; empty if it is not set."""
    if not time.seconds:
        return ""
    return datetime.fromtimestamp(time.seconds, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def duration_text(seconds: float) -> str:
    """Formats a duration, e.g. 3 h 4 min, 2 min 5 s or 12 s."""
    whole = max(0, round(seconds))
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    if whole >= 60:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole} s"


def worked_s(run: run_pb2.Run) -> float:
    """Returns the seconds that the run's processes took, without the time between a stop or a failure and the next attempt."""
    ended = [each for each in run.attempts if each.HasField("end_time")]
    return sum(_seconds(each.end_time) - _seconds(each.start_time) for each in ended)


def _seconds(time: Timestamp) -> float:
    return time.seconds + time.nanos / 1e9


def spec_text(spec: run_pb2.RunSpec) -> str:
    """Formats `spec` as a run file in YAML."""
    import yaml

    return yaml.safe_dump(as_json(spec), sort_keys=False, allow_unicode=True, width=100)
