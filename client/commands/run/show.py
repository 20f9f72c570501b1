"""`stillhouse run list | show`: all runs, and one in full; above all why it failed, and what to do."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.protos.stillhouse.v1.run_pb2 import Attempt, Run


STATES = ("pending", "starting", "running", "stopping", "stopped", "completed", "failed")


@command(name="list")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(STATES, case_sensitive=False),
    help="Only runs in this state; may be repeated.",
)
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Most runs to show.")
def list_runs(session: Session, states: tuple[str, ...], limit: int) -> None:
    """List runs, newest first."""
    from stillhouse.client.core.json_output import as_json
    from stillhouse.client.terminal.render import columns, progress_text, state_name, time_text
    from stillhouse.client.trainer.run_lookup import run_id
    from stillhouse.protos.stillhouse.v1.run_pb2 import Run

    wanted = [Run.State.Value(f"STATE_{state.upper()}") for state in states]
    documents, rows = [], []
    for run in itertools.islice(session.trainer.runs(wanted), limit):
        documents.append(as_json(run) | {"id": run_id(run.name)})
        progress, created = progress_text(run.progress), time_text(run.create_time)
        rows.append((run_id(run.name), state_name(run), progress, created, run.spec.display_name))
    empty = "There are no such runs." if states else "There are no runs yet."
    table = columns(rows, header=("ID", "STATE", "STEP", "CREATED", "NAME"), empty=empty)
    session.show({"runs": documents}, table)


@command(name="show")
@click.argument("run")
def show(session: Session, run: str) -> None:
    """Show RUN in full, and why it failed.

    State, reason of a failure and what to do, attempts, latest metrics, effective settings.
    """
    from stillhouse.client.core.json_output import as_json
    from stillhouse.client.terminal.render import columns, number_text, spec_text

    handle = session.run(run)
    found = handle.get()
    latest = {
        key: (int(series.steps[-1]), float(series.values[-1]))
        for key, series in handle.metrics().items()
        if len(series.steps)
    }
    if session.as_json:
        metrics = {key: {"step": step, "value": value} for key, (step, value) in latest.items()}
        session.emit(as_json(found) | {"id": handle.id, "latest_metrics": metrics})
        return
    session.say(columns(_facts(found)))
    if found.HasField("error"):
        session.say(f"\n{_failure(found)}")
    if found.attempts:
        session.say("\nAttempts\n" + columns(_attempt(each) for each in found.attempts))
    if latest:
        rows = [(key, number_text(value), f"step {step}") for key, (step, value) in latest.items()]
        session.say("\nLatest metrics\n" + columns(rows))
    session.say("\nEffective settings\n" + spec_text(found.effective_spec).rstrip())


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    from stillhouse.client.terminal.render import number_text, progress_text, state_name, time_text
    from stillhouse.client.trainer.run_lookup import run_id

    yield "run", run_id(run.name)
    if run.spec.display_name:
        yield "name", run.spec.display_name
    yield "state", state_name(run)
    yield "step", progress_text(run.progress)
    if run.progress.trained_tokens:
        speed = f", {number_text(run.progress.tokens_per_second)} a second lately"
        yield "tokens", f"{run.progress.trained_tokens:,} trained on" + speed
    if run.latest_checkpoint:
        yield "checkpoint", run.latest_checkpoint
    yield "created", f"{time_text(run.create_time)} by Stillhouse {run.created_by_version}"
    for name, time in (("started", run.start_time), ("ended", run.end_time)):
        if time_text(time):
            yield name, time_text(time)
    for key, value in sorted(run.spec.labels.items()):
        yield f"label {key}", value


def _failure(run: Run) -> str:
    from stillhouse.client.trainer.run_lookup import run_id
    from stillhouse.protos.errors import from_status

    error = from_status(run.error)
    run_name = run_id(run.name)
    text = f"Why it failed ({error.reason})\n  {error.message}\n  Its log: stillhouse run logs {run_name}"
    if run.latest_checkpoint:
        text += f"\n  `stillhouse run resume {run_name}` continues from {run.latest_checkpoint}"
    return text


def _attempt(attempt: Attempt) -> tuple[str, str, str, str]:
    from stillhouse.client.terminal.render import time_text
    from stillhouse.protos.errors import from_status

    steps = f"steps {attempt.first_step} to {attempt.last_step}" if attempt.last_step else "no step"
    if attempt.HasField("error"):
        ending = from_status(attempt.error).message
    elif attempt.signal:
        ending = f"ended by {_signal_name(attempt.signal)}"
    elif attempt.HasField("end_time"):
        ending = "ended" if attempt.exit_code == 0 else f"ended with exit code {attempt.exit_code}"
    else:
        ending = "alive"
    return f"  {attempt.number}", time_text(attempt.start_time), steps, ending


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
