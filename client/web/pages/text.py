"""Numbers, times and sizes as text on a page."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from itertools import pairwise

from google.protobuf.timestamp_pb2 import Timestamp
from markupsafe import Markup, escape

_BETWEEN_BACKTICKS = re.compile(r"`([^`\n]+)`")
_UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


def number(value: float, digits: int = 4) -> str:
    """A number with `digits` significant digits, from 1,000 on whole, with commas between thousands."""
    if abs(value) < 1e15 and (abs(value) >= 1000 or value == int(value)):  # false for NaN and infinities
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """A duration in its largest unit: 12 s, 5 min, 3 h, 8 d."""
    for unit_s, unit in _UNITS:
        if seconds >= unit_s:
            return f"{int(seconds // unit_s)} {unit}"
    return f"{max(0, int(seconds))} s"


def precise_duration(seconds: float) -> str:
    """A duration in its two largest units: 1 min 49 s, 3 h, 2 d 5 h."""
    for (unit_s, _), (part_s, _) in pairwise((*_UNITS, (1, "s"))):
        if seconds >= unit_s:
            rest = duration(seconds % unit_s) if seconds % unit_s >= part_s else ""
            return f"{duration(seconds)} {rest}".rstrip()
    return duration(seconds)


def age(timestamp: Timestamp) -> str:
    """Time since `timestamp`; empty if it is unset."""
    return duration(time.time() - timestamp.seconds) if timestamp.seconds else ""


def between(start: Timestamp, end: Timestamp) -> str:
    """Time from `start` to `end`, or until the present if `end` is unset; empty without a start."""
    return precise_duration((end.seconds or time.time()) - start.seconds) if start.seconds else ""


def iso(timestamp: Timestamp) -> str:
    """RFC 3339 in UTC; empty if it is unset."""
    if not timestamp.seconds:
        return ""
    return datetime.fromtimestamp(timestamp.seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def moment(timestamp: Timestamp) -> str:
    """Date and time in UTC, for people; empty if it is unset."""
    return iso(timestamp).replace("T", " ").removesuffix("Z") + " UTC" if timestamp.seconds else ""


def size(count: int) -> str:
    """Bytes in binary units."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def dataset_name(name: str) -> str:
    """The name of a dataset without its folder: gsm8k@2, or a SHA-256."""
    return name.removeprefix("datasets/")


def shorter(name: str) -> str:
    """A SHA-256 as its first digits; other names as they are."""
    return name[:12] if len(name) == 64 and "@" not in name else name


def with_code(sentence: str) -> Markup:
    """A sentence as HTML, with what stands between backticks as code."""
    return Markup(_BETWEEN_BACKTICKS.sub(r"<code>\1</code>", str(escape(sentence))))  # noqa: S704 - escaped before
