"""`stillhouse run watch`: follows a run to its end, across lost streams."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.client.trainer.run_handle import RunHandle


@command(name="watch")
@click.argument("run")
@click.option(
    "--after-sequence",
    type=click.IntRange(0),
    default=0,
    help="Leave out events up to this sequence (see --json).",
)
def watch(session: Session, run: str, after_sequence: int) -> int:
    """Follow RUN until it ends: state changes, steps, evaluations.

    A lost connection is made again. Ctrl-C stops watching, not the run. With --json each event is one line. The exit
    code is 0 if the run completed, 1 if it failed and 5 if it was stopped.
    """
    return follow(session, session.run(run), after_sequence)


def follow(session: Session, run: RunHandle, after_sequence: int = 0) -> int:
    """Shows the events of `run` until it ends; the exit code of the command that waits for it."""
    from stillhouse.client.core.json_output import as_json
    from stillhouse.client.terminal.run_progress import run_view

    state = 0
    try:
        with nullcontext() if session.as_json else run_view() as view:
            for event in run.watch(
                after_sequence=after_sequence, on_lost=None if view is None else view.lost
            ):
                if view is None:
                    session.emit(as_json(event))
                else:
                    view.show(event)
                state = event.run.state if event.WhichOneof("event") == "run" else state
        return _code(state or run.get().state)
    except KeyboardInterrupt:
        session.note(
            f"\nNo longer watching; run {run.id} continues. To see it again: stillhouse run watch {run.id}. "
            f"To end it: stillhouse run stop {run.id}."
        )
        return 130


def _code(state: int) -> int:
    from stillhouse.client.core.errors import ExitCode
    from stillhouse.protos.stillhouse.v1.run_pb2 import Run

    codes: dict[int, ExitCode] = {Run.STATE_FAILED: ExitCode.FAILED, Run.STATE_STOPPED: ExitCode.CONFLICT}
    return codes.get(state, ExitCode.OK)
