"""`stillhouse run list`."""

from __future__ import annotations

import itertools

import click

from stillhouse.client.terminal.session import Session, command

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
    runs = list(itertools.islice(session.trainer.runs(wanted), limit))
    if session.as_json:
        session.emit({"runs": [as_json(run) | {"id": run_id(run.name)} for run in runs]})
    elif not runs:
        session.say("There are no such runs." if states else "There are no runs yet.")
    else:
        rows = [
            (
                run_id(run.name),
                state_name(run),
                progress_text(run.progress),
                time_text(run.create_time),
                run.spec.display_name,
            )
            for run in runs
        ]
        session.say(columns(rows, header=("ID", "STATE", "STEP", "CREATED", "NAME")))


COMMANDS = (list_runs,)
