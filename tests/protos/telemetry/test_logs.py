"""Log lines: one JSON object each, for own events and those of libraries."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from stillhouse.protos.telemetry.logs import configure_logging

PROGRAM = """
import logging, structlog
from stillhouse.protos.telemetry.logs import configure_logging
configure_logging("info")
log = structlog.get_logger("x")
log.debug("hidden")
with structlog.contextvars.bound_contextvars(rpc="/a/b"):
    log.info("run started", run="runs/abc", pid=7, path=__import__("pathlib").Path("/x"))
logging.getLogger("library").warning("careful %s", "now")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("broken\\nline")
"""


def test_every_event_is_one_json_line_with_time_and_level() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["level"], line["event"]) for line in lines] == [
        ("info", "run started"),
        ("warning", "careful now"),
        ("error", "broken\nline"),
    ]
    assert all(line["ts"].endswith("Z") for line in lines)
    assert lines[0]["run"] == "runs/abc"
    assert lines[0]["rpc"] == "/a/b"
    assert lines[0]["path"] == "/x"
    assert "ZeroDivisionError" in lines[2]["exception"]


def test_an_unknown_level_is_refused() -> None:
    before = logging.getLogger().handlers[:]
    with pytest.raises(ValueError, match="no log level 'loud'"):
        configure_logging("loud")
    assert logging.getLogger().handlers == before


def test_a_line_that_cannot_be_written_raises_nothing() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM + 'print("went on")'],
            stdout=subprocess.PIPE,
            stderr=full,
            text=True,
            check=True,
        )
    assert done.stdout == "went on\n"


QUIET = """
import logging, warnings
from stillhouse.protos.telemetry.logs import configure_logging, quieten_libraries
configure_logging("info")
quieten_libraries()
warnings.warn("deprecated", DeprecationWarning)
warnings.warn("careful", UserWarning)
logging.getLogger("library").warning("unusual")
logging.getLogger("library").error("broken")
"""


def test_warnings_of_libraries_are_shown_where_somebody_asks() -> None:
    for options, expected in (
        ([], ["broken"]),
        (["-W", "default"], ["deprecated", "careful", "unusual", "broken"]),
    ):
        python = [sys.executable, *options, "-c", QUIET]
        done = subprocess.run(python, capture_output=True, text=True, check=True)
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        assert len(lines) == len(expected)
        assert all(word in line["event"] for word, line in zip(expected, lines, strict=True))


ENDING = """
import atexit, ctypes, sys
{call}
ctypes.pythonapi.Py_AtExit(ctypes.CDLL(None).malloc_stats)  # writes to stderr, as extension modules' reports do
atexit.register(lambda: print("handler", file=sys.stderr))
sys.exit(3)
"""


def test_output_ends_with_the_last_handler() -> None:
    import_ = "from stillhouse.protos.telemetry.logs import end_output_with_handlers"
    for call, goes_on in (("", True), (f"{import_}; end_output_with_handlers()", False)):
        python = [sys.executable, "-c", ENDING.format(call=call)]
        done = subprocess.run(python, capture_output=True, text=True, check=False)
        assert done.returncode == 3
        assert done.stderr.startswith("handler\n")
        assert ("Arena 0" in done.stderr) is goes_on
