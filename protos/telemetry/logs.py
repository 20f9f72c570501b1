"""Logging set-up of every program: one event a line, JSON unless a person reads it on a terminal."""

import atexit
import contextlib
import logging
import os
import sys
import warnings
from typing import TextIO, cast

import structlog


def configure_logging(level: str = "info", *, stream: TextIO | None = None) -> None:
    """Sends this program's events, and those of the libraries, to `stream` (stderr by default).

    Lines carry ts (UTC, RFC 3339), level and event. Raises ValueError for a level that logging lacks.
    """
    stream = cast("TextIO", _Lossy(sys.stderr if stream is None else stream))
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"no log level {level!r}; use debug, info, warning or error")
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
    ]
    if stream.isatty():
        render: list[structlog.types.Processor] = [structlog.dev.ConsoleRenderer(timestamp_key="ts")]
    else:
        render = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(level=max(number, logging.WARNING), handlers=[handler], force=True)


def quieten_libraries() -> None:
    """Keeps warnings of libraries out of this program's output: they tell programmers about calls that no user can change.

    Errors stay. Python's -W, PYTHONWARNINGS and the libraries' own variables bring warnings back. Call before the libraries
    are imported.
    """
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if sys.warnoptions:
        logging.captureWarnings(True)
        return
    warnings.simplefilter("ignore")
    logging.getLogger().setLevel(logging.ERROR)


def end_output_with_handlers() -> None:
    """Ends this process's output with its last exit handler; call first, since handlers run in reverse order.

    What follows are reports of extension modules about their own memory, such as nanobind's of leaked instances.
    """

    def end() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)

    atexit.register(end)


class _Lossy:
    """A log stream that drops what cannot be written, as on a full disk, instead of raising."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()
