"""Shows a run's events as they arrive: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stillhouse.client.terminal.render import (
    duration_text,
    number_text,
    printable,
    progress_text,
    state_name,
    worked_s,
)
from stillhouse.client.trainer.advice import waits_for
from stillhouse.client.trainer.run_handle import ENDED
from stillhouse.client.trainer.run_lookup import run_id
from stillhouse.protos.errors import StillhouseError, from_status
from stillhouse.protos.stillhouse.v1 import run_pb2

PLAIN_INTERVAL_S = 5.0
"""Shortest time between two lines about steps without a terminal."""
LOSS = "train/loss"
PREPARED, ROWS, ROW_SPEED, LEFT = (
    "data/prepared_rows",
    "data/rows",
    "data/rows_per_second",
    "data/left_s",
)
STORED, BYTES_PER_TOKEN = "cache/sequences", "cache/bytes_per_token"
SPEEDS = ("train/tokens_per_second", "cache/tokens_per_second")
EVALUATION = "eval/"


class RunView(ABC):
    """Shows the events of one run."""

    def __init__(self) -> None:
        self._state = ""
        self._progress = run_pb2.Progress()
        self._attempts = 0
        self._is_lost = False

    def show(self, event: run_pb2.WatchRunResponse) -> None:
        """Shows one event."""
        if self._is_lost:
            self._is_lost = False
            self.line("Connected again.")
        if event.WhichOneof("event") == "run":
            self._show_run(event.run)
        elif event.WhichOneof("event") == "metrics":
            evaluated = evaluation_text(event.metrics)
            if evaluated:
                self.line(evaluated)
            if PREPARED in event.metrics.values:
                self.preparation(event.metrics)
            if LOSS in event.metrics.values or STORED in event.metrics.values:
                self.step(event.metrics, self._progress.total_steps)

    def lost(self, error: StillhouseError, pause_s: float) -> None:
        """Reports once that the stream was lost and will be tried again."""
        if not self._is_lost:
            self._is_lost = True
            self.line(f"{error.message}\nTrying again in {pause_s:.1f} s; the run is not affected.")

    def _show_run(self, run: run_pb2.Run) -> None:
        self._progress.CopyFrom(run.progress)
        state = f"{state_name(run)} {waits_for(run)}"
        if state != self._state or len(run.attempts) != self._attempts:
            self._state, self._attempts = state, len(run.attempts)
            self.line(state_line(run))
        self.update(run)

    @abstractmethod
    def line(self, text: str) -> None:
        """Shows one permanent line."""

    @abstractmethod
    def step(self, point: run_pb2.MetricPoint, total_steps: int) -> None:
        """Shows the metrics of a step."""

    @abstractmethod
    def preparation(self, point: run_pb2.MetricPoint) -> None:
        """Shows how far the preparation of the data is."""

    @abstractmethod
    def update(self, run: run_pb2.Run) -> None:
        """Shows the run's progress."""


class PlainView(RunView):
    """Prints lines on standard output, those about steps at most every few seconds."""

    def __init__(self, interval_s: float = PLAIN_INTERVAL_S) -> None:
        super().__init__()
        self._interval_s = interval_s
        self._next_s = 0.0

    def line(self, text: str) -> None:
        print(printable(text), flush=True)

    def step(self, point: run_pb2.MetricPoint, total_steps: int) -> None:
        now = time.monotonic()
        if now >= self._next_s or point.step == total_steps:
            self._next_s = now + self._interval_s
            self.line(step_text(point, total_steps))

    def preparation(self, point: run_pb2.MetricPoint) -> None:
        now = time.monotonic()
        if now >= self._next_s:
            self._next_s = now + self._interval_s
            self.line(preparation_text(point))

    def update(self, run: run_pb2.Run) -> None:
        pass


class TerminalView(RunView):
    """A progress bar, with lines above it."""

    def __init__(self, progress: Any) -> None:
        super().__init__()
        self._bar = progress
        self._task = progress.add_task("", total=None, loss="", speed="")

    def line(self, text: str) -> None:
        self._bar.console.print(printable(text), markup=False, highlight=False)

    def step(self, point: run_pb2.MetricPoint, total_steps: int) -> None:
        speed = _speed(point)
        self._bar.update(
            self._task,
            completed=point.step,
            total=total_steps or None,
            loss=_achieved(point),
            speed=f"{number_text(speed)} tokens/s" if speed is not None else "",
        )

    def preparation(self, point: run_pb2.MetricPoint) -> None:
        self._bar.update(self._task, loss=preparation_text(point), speed="")

    def update(self, run: run_pb2.Run) -> None:
        self._bar.update(
            self._task,
            description=state_name(run),
            completed=run.progress.step,
            total=run.progress.total_steps or None,
        )


@contextmanager
def run_view() -> Iterator[RunView]:
    """The view for standard output."""
    if not sys.stdout.isatty():
        yield PlainView()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    ) as progress:
        yield TerminalView(progress)


def state_text(run: run_pb2.Run) -> str:
    """Formats a run's state and what it waits for, e.g. "PENDING, waiting for a free CPU slot, behind 2 runs"."""
    needed = waits_for(run)
    if not needed:
        return state_name(run)
    return f"{state_name(run).partition(',')[0]}, waiting for {needed}"


def state_line(run: run_pb2.Run) -> str:
    """Formats a run's state in one line; with its duration once it has ended, and its error if it failed."""
    text = f"run {run_id(run.name)}: {state_text(run)}"
    if run.progress.step:
        text += f" at step {progress_text(run.progress).partition(' ')[0]}"
    if len(run.attempts) > 1:
        text += f", attempt {len(run.attempts)}"
    if run.state in ENDED and run.attempts:
        text += f" after {duration_text(worked_s(run))}"
    if run.state == run_pb2.Run.STATE_FAILED and run.HasField("error"):
        text += f"\n{from_status(run.error).message}"
    return text


def preparation_text(point: run_pb2.MetricPoint) -> str:
    """Formats the preparation of the data, e.g. "data: 20,000 of 1,000,000 rows  5,120 rows/s  3 min 11 s left"."""
    values = point.values
    of = f" of {values[ROWS]:,.0f}" if ROWS in values else ""
    parts = [f"data: {values[PREPARED]:,.0f}{of} rows", f"{values[ROW_SPEED]:,.0f} rows/s"]
    if LEFT in values:
        parts.append(f"{duration_text(values[LEFT])} left")
    return "  ".join(parts)


def step_text(point: run_pb2.MetricPoint, total_steps: int) -> str:
    """Formats a step, e.g. "step 10/500  loss 1.23  456 tokens/s"."""
    parts = [f"step {point.step}/{total_steps}" if total_steps else f"step {point.step}"]
    parts.append(_achieved(point))
    speed = _speed(point)
    if speed is not None:
        parts.append(f"{number_text(speed)} tokens/s")
    return "  ".join(parts)


def _speed(point: run_pb2.MetricPoint) -> float | None:
    return next((point.values[name] for name in SPEEDS if name in point.values), None)


def _achieved(point: run_pb2.MetricPoint) -> str:
    """Formats the loss, or for a cache build the stored sequences and bytes per token."""
    if LOSS in point.values:
        return f"loss {number_text(point.values[LOSS])}"
    text = f"{number_text(point.values[STORED])} sequences stored"
    if BYTES_PER_TOKEN in point.values:
        text += f"  {number_text(point.values[BYTES_PER_TOKEN])} bytes/token"
    return text


def evaluation_text(point: run_pb2.MetricPoint) -> str:
    """Formats an evaluation, e.g. "step 100  kl 0.12  perplexity 3.1"; empty without evaluation metrics."""
    values = {key: value for key, value in sorted(point.values.items()) if key.startswith(EVALUATION)}
    if not values:
        return ""
    shown = [f"{key.removeprefix(EVALUATION)} {number_text(value)}" for key, value in values.items()]
    return "  ".join([f"step {point.step}  evaluation:", *shown])
