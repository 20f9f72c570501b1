"""`stillhouse run list | show`: all runs, and one in full; above all why it failed, and what to do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.protos.stillhouse.v1.run_pb2 import Attempt, LossSpec, Run


PACE_STEPS = 20
"""Last steps whose mean pace is shown."""
STATES = ("pending", "starting", "running", "stopping", "stopped", "completed", "failed")


@command(name="list")
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice(STATES, case_sensitive=False),
    help="Only runs in this state; may be repeated.",
)
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="KEY[=VALUE]",
    help="Only runs with this label; may be repeated.",
)
@click.option("--text", default="", help="Only runs with this in their id, name or student's model.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Most runs to show.")
def list_runs(
    session: Session, *, states: tuple[str, ...], labels: tuple[str, ...], text: str, limit: int
) -> None:
    """List runs, newest first."""
    from stillhouse.client.core.json_output import as_json
    from stillhouse.client.terminal.render import columns, progress_text, time_text
    from stillhouse.client.terminal.run_progress import state_text
    from stillhouse.client.trainer.run_lookup import run_id
    from stillhouse.protos.stillhouse.v1.run_pb2 import Run

    wanted = [Run.State.Value(f"STATE_{state.upper()}") for state in states]
    documents, rows = [], []
    for run in itertools.islice(session.trainer.runs(wanted, labels=labels, text=text), limit):
        documents.append(as_json(run) | {"id": run_id(run.name)})
        progress, created = progress_text(run.progress), time_text(run.create_time)
        rows.append((run_id(run.name), state_text(run), progress, created, run.spec.display_name))
    empty = "There are no such runs." if states or labels or text else "There are no runs yet."
    table = columns(rows, header=("ID", "STATE", "STEP", "CREATED", "NAME"), empty=empty)
    session.show({"runs": documents}, table)


@command(name="show")
@click.argument("run")
@click.option(
    "--settings", is_flag=True, help="Show the effective settings, with every default, as a run file."
)
def show(session: Session, run: str, settings: bool) -> None:
    """Show RUN's state, the reason of a failure and what to do, then attempts and latest metrics."""
    from stillhouse.client.core.json_output import as_json
    from stillhouse.client.terminal.render import columns, number_text, spec_text
    from stillhouse.protos.telemetry.pace import pace_of

    handle = session.run(run)
    found = handle.get()
    metrics = handle.metrics()
    latest = {
        key: (int(series.steps[-1]), float(series.values[-1]))
        for key, series in metrics.items()
        if len(series.steps)
    }
    pace = pace_of({key: series.values[-PACE_STEPS:].tolist() for key, series in metrics.items()})
    if session.as_json:
        latest_metrics = {key: {"step": step, "value": value} for key, (step, value) in latest.items()}
        session.emit(as_json(found) | {"id": handle.id, "latest_metrics": latest_metrics})
        return
    told = (
        ()
        if pace is None
        else (("pace", pace.sentence()), *((("advice", pace.advice),) if pace.advice else ()))
    )
    session.say(columns((*_condition(found), *_facts(found), *told)))
    if found.attempts:
        session.say("\nAttempts\n" + columns(_attempt(each) for each in found.attempts))
    if latest:
        rows = [(key, number_text(value), f"step {step}") for key, (step, value) in latest.items()]
        session.say("\nLatest metrics\n" + columns(rows))
    if settings:
        session.say("\nEffective settings\n" + spec_text(found.effective_spec).rstrip())


def _condition(run: Run) -> Iterator[tuple[str, str]]:
    """State, reason of a failure, and what to do."""
    from stillhouse.client.terminal.run_progress import state_text
    from stillhouse.client.trainer.advice import next_step
    from stillhouse.protos.errors import from_status

    yield "state", state_text(run)
    if run.HasField("error"):
        error = from_status(run.error)
        yield "reason", str(error.reason)
        yield "why", error.message
    yield "next", next_step(run)


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    from stillhouse.client.terminal.render import (
        duration_text,
        number_text,
        progress_text,
        time_text,
        worked_s,
    )
    from stillhouse.client.trainer.run_lookup import run_id

    yield "run", run_id(run.name)
    if run.spec.display_name:
        yield "name", run.spec.display_name
    yield "step", progress_text(run.progress)
    yield from _targets(run)
    if run.progress.trained_tokens:
        speed = f", {number_text(run.progress.tokens_per_second)} a second lately"
        yield "tokens", f"{run.progress.trained_tokens:,} trained on" + speed
    if run.datasets:
        yield "datasets", ", ".join(each.removeprefix("datasets/") for each in run.datasets)
    if run.latest_checkpoint:
        yield "checkpoint", run.latest_checkpoint
    yield "created", f"{time_text(run.create_time)} by Stillhouse {run.created_by_version}"
    for name, time in (("started", run.start_time), ("ended", run.end_time)):
        if time_text(time):
            yield name, time_text(time)
    if len(run.attempts) > 1:
        yield "worked", f"{duration_text(worked_s(run))} in {len(run.attempts)} attempts"
    for key, value in sorted(run.spec.labels.items()):
        yield f"label {key}", value


def _targets(run: Run) -> Iterator[tuple[str, str]]:
    """The target and the layers of hidden states of each loss for which the trainer settled them, with the reason."""
    spec = run.effective_spec
    own = [context.loss for context in spec.contexts if context.HasField("loss")]
    losses = [spec.loss, *own]
    for target in dict.fromkeys(_target(each) for each in losses):
        if target:
            yield "target", target
    for layers in dict.fromkeys(_layers(each) for each in losses):
        if layers:
            yield "layers", layers


def _target(loss: LossSpec) -> str:
    if not loss.sparse_target_reason:
        return ""
    draws = (
        f" and {loss.num_samples} draws"
        if "sampled" in loss.sparse_target or "stratified" in loss.sparse_target
        else ""
    )
    return f"{loss.sparse_target}, top-{loss.top_k}{draws}: {loss.sparse_target_reason}"


def _layers(loss: LossSpec) -> str:
    hidden = loss.hidden_mse
    if not hidden.layers_reason:
        return ""
    pairs = ", ".join(f"{each.student} with {each.teacher}" for each in hidden.layers)
    return f"student's {pairs} of the teacher: {hidden.layers_reason}"


def _attempt(attempt: Attempt) -> tuple[str, str, str, str]:
    from stillhouse.client.terminal.render import time_text
    from stillhouse.protos.child_process import signal_name
    from stillhouse.protos.errors import from_status

    steps = f"steps {attempt.first_step} to {attempt.last_step}" if attempt.last_step else "no step"
    if attempt.HasField("error"):
        ending = from_status(attempt.error).message
    elif attempt.signal:
        ending = f"ended by {signal_name(attempt.signal)}"
    elif attempt.HasField("end_time"):
        ending = "ended" if attempt.exit_code == 0 else f"ended with exit code {attempt.exit_code}"
    else:
        ending = "alive"
    return f"  {attempt.number}", time_text(attempt.start_time), steps, ending
