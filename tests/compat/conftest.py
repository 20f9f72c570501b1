"""The table of the suite, printed after its tests: a row for each architecture, a column for each stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.compat.walk import STAGES

RESULTS = "stages"
"""Property of a test's report: what became of each stage, which pytest-xdist carries along."""
_rows: dict[str, Mapping[str, str]] = {}
_seconds: dict[str, float] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keeps the results of an architecture."""
    for name, value in report.user_properties:
        if name == RESULTS and report.when == "call":
            own: Any = value
            _rows[own["architecture"]] = own
            _seconds[own["architecture"]] = report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the table."""
    if not _rows:
        return
    terminalreporter.section("architectures")
    width = max(12, *map(len, _rows))
    columns = [max(len(stage), *(len(each.get(stage, "-")) for each in _rows.values())) for stage in STAGES]

    def line(name: str, cells: Mapping[str, str], end: str) -> str:
        return "  ".join(
            (
                name.ljust(width),
                *(cells.get(stage, "-").ljust(size) for stage, size in zip(STAGES, columns, strict=True)),
                end,
            )
        )

    terminalreporter.write_line(line("", {stage: stage for stage in STAGES}, "s"))
    for name, own in sorted(_rows.items()):
        terminalreporter.write_line(line(name, own, f"{_seconds[name]:.1f}"))
    cells = [own.get(stage, "-") for own in _rows.values() for stage in STAGES]
    right, wrong = cells.count("ok"), cells.count("WRONG")
    terminalreporter.write_line(
        f"{len(_rows)} architectures: {right} stages right, {len(cells) - right - wrong - cells.count('-')} refused "
        f"by name, {wrong} wrong, {cells.count('-')} not reached"
    )
