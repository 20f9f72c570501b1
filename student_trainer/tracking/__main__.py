"""The tracker process: `python -m stillhouse.student_trainer.tracking RUN_DIR --kind KIND`, live or after a run.

The run service starts it with the tracker's secret in its environment. By hand it sends a run that no service started.
Exit code 0: the run has ended and the tracker has all of it, or a signal ended the process. 1: the tracker failed. 2: it
hung. The same command goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO, cast

import click
import structlog

from stillhouse.protos.errors import first_line
from stillhouse.protos.files.locks import try_lock
from stillhouse.protos.telemetry.logs import configure_logging, quieten_libraries
from stillhouse.student_trainer.config.resources import TRACKERS
from stillhouse.student_trainer.run_dir import RunDir
from stillhouse.student_trainer.tracking.run_facts import trackers_path
from stillhouse.student_trainer.tracking.run_log import RunLog
from stillhouse.student_trainer.tracking.session import Session
from stillhouse.student_trainer.tracking.tracker import tracker_of

EXIT_FAILED = 1
EXIT_HUNG = 2
LOCKED_S = 10.0
"""Time beyond a limit after which the interpreter's lock is held for good."""
NICENESS = 10
"""Training goes first where both share a core."""
SECRETS_VARIABLE = "STILLHOUSE_TRACKER_SECRETS"
"""Names of environment variables whose values no log may show, with commas between."""

log = structlog.get_logger()


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.option("--kind", type=click.Choice(TRACKERS), required=True, help="Tracker of the run's `trackers`.")
@click.option("--parent", type=int, default=None, hidden=True, help="Process with which this one ends.")
def main(*, run_dir: Path, kind: str, parent: int | None) -> None:
    """Send the run in RUN_DIR to one of its trackers, until the run has ended."""
    run = RunDir(run_dir.resolve())
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    configure_logging("info", stream=None if parent is None else cast("TextIO", RunLog(run, _secrets())))
    quieten_libraries()
    structlog.contextvars.bind_contextvars(run=run.path.name)

    def stop(wait_s: float) -> bool:
        return stopped.wait(wait_s) or (parent is not None and os.getppid() != parent)

    trackers_path(run).mkdir(exist_ok=True)
    lock = try_lock(trackers_path(run) / f".{kind}.lock")
    if lock is None:
        log.warning("another process sends this run to the tracker", tracker=kind)
        sys.exit(EXIT_FAILED)
    with lock, _own_home():
        sys.exit(_send(run, kind, stop))


def _send(run: RunDir, kind: str, stop: Callable[[float], bool]) -> int:
    """The exit code."""
    try:
        Session(run, kind, tracker_of(kind), watch=_watch).run(stop)
    except ImportError as error:
        log.warning(
            "tracker is not installed; metrics are in the run's directory",
            tracker=kind,
            why=first_line(error),
            remedy=f'pip install "stillhouse[{kind}]"',
        )
        return EXIT_FAILED
    except Exception as error:  # a library raises whatever it raises
        log.warning(
            "tracker failed; metrics are in the run's directory",
            tracker=kind,
            why=f"{type(error).__name__}: {first_line(error)}",
        )
        return EXIT_FAILED
    return 0


@contextlib.contextmanager
def _watch(limit_s: float) -> Iterator[None]:
    """Ends the process if the block takes longer, also where the library holds the interpreter's lock."""
    timer = threading.Timer(limit_s, _give_up, [limit_s])
    timer.daemon = True
    with Path(os.devnull).open("w") as nowhere:
        faulthandler.dump_traceback_later(limit_s + LOCKED_S, exit=True, file=nowhere)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            faulthandler.cancel_dump_traceback_later()


def _give_up(limit_s: float) -> None:
    log.warning("tracker hangs; metrics are in the run's directory", limit_s=limit_s)
    os._exit(EXIT_HUNG)


@contextlib.contextmanager
def _own_home() -> Iterator[None]:
    """Gives libraries an empty home, so that no account of this machine's user counts."""
    with tempfile.TemporaryDirectory(prefix="stillhouse-tracker-", ignore_cleanup_errors=True) as home:
        os.environ |= {"HOME": home, "XDG_CONFIG_HOME": home, "XDG_CACHE_HOME": home, "NETRC": f"{home}/none"}
        os.chdir(home)  # some read settings in the working directory
        yield
        os.chdir("/")


def _secrets() -> list[str]:
    names = os.environ.pop(SECRETS_VARIABLE, "").split(",")
    return [os.environ[name] for name in names if os.environ.get(name)]


if __name__ == "__main__":
    main()
