"""A pytest plugin (`-p tests.faults.report`): prints the fault matrix with what became of each row, and fails if one has no test.

It works with pytest-xdist: rows travel with the reports of tests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.faults.matrix import ROWS

ROW_PROPERTY = "fault_row"
FIGURE_PROPERTY = "figure"
"""A measurement of a test, in words: printed below its line."""

_reports: dict[str, pytest.TestReport] = {}


def rows_of(item: pytest.Item) -> list[int]:
    """The rows of the matrix that a test names."""
    return [int(mark.kwargs["row"]) for mark in item.iter_markers("faults")]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Gives each report the rows of its test."""
    outcome = yield
    report: pytest.TestReport = outcome.get_result()  # type: ignore[attr-defined]
    report.user_properties.extend((ROW_PROPERTY, row) for row in rows_of(item))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keeps the phase of each test that tells its outcome."""
    known = _reports.get(report.nodeid)
    if report.when == "call" or not report.passed or known is None:
        _reports[report.nodeid] = report


def is_narrowed(config: pytest.Config) -> bool:
    """True if only a part of the suite, or its names alone, was asked for."""
    return bool(
        config.option.keyword or config.option.collectonly or config.args != config.getini("testpaths")
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints row, tests and outcomes, and what a test measured."""
    write = terminalreporter.write_line
    by_row: dict[int, list[pytest.TestReport]] = defaultdict(list)
    for report in _reports.values():
        for name, value in report.user_properties:
            if name == ROW_PROPERTY:
                by_row[int(str(value))].append(report)
    terminalreporter.section("fault matrix")
    for row in ROWS:
        if is_narrowed(config) and not by_row[row.number]:
            continue
        write(f"{row.number:2} {row.fault}: {row.ends}")
        for report in by_row[row.number]:
            write(f"     {report.outcome:7} {report.duration:6.1f} s  {report.nodeid}")
            for figure in (value for name, value in report.user_properties if name == FIGURE_PROPERTY):
                write(f"                     {figure}")
        if not by_row[row.number]:
            write("     NO TEST")
    skipped = [report for report in _reports.values() if report.skipped]
    covered = sum(any(report.passed for report in by_row[row.number]) for row in ROWS)
    reasons = "; ".join(sorted({str(_reason(report)) for report in skipped})) or "none"
    write(
        f"rows: {len(ROWS)}, covered: {covered}, tests: {len(_reports)}, skipped: {len(skipped)} ({reasons})"
    )


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a whole run of the suite in which a row had no test."""
    if is_narrowed(session.config) or hasattr(session.config, "workerinput"):
        return
    seen = {
        value
        for report in _reports.values()
        for name, value in report.user_properties
        if name == ROW_PROPERTY
    }
    if session.exitstatus == pytest.ExitCode.OK and any(row.number not in seen for row in ROWS):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _reason(report: pytest.TestReport) -> str:
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
