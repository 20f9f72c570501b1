"""`stillhouse run watch | stop | resume | delete`: follows a run to its end, across lost streams, and controls it."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.client.trainer.run_handle import RunHandle
    from stillhouse.protos.stillhouse.v1.run_pb2 import Run


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
    """Shows the events of `run` until it ends, and what to do then; the exit code of the command that waits for it."""
    from stillhouse.client.core.json_output import as_json
    from stillhouse.client.terminal.run_progress import run_view
    from stillhouse.client.trainer.advice import next_step

    last: Run | None = None
    try:
        with nullcontext() if session.as_json else run_view() as view:
            for event in run.watch(
                after_sequence=after_sequence, on_lost=None if view is None else view.lost
            ):
                if view is None:
                    session.emit(as_json(event))
                else:
                    view.show(event)
                if event.WhichOneof("event") == "run":
                    last = event.run
        last = last or run.get()
        if not session.as_json:
            session.say(_capitalised(next_step(last)))
        return _code(last.state)
    except KeyboardInterrupt:
        session.note(
            f"\nNo longer watching; run {run.id} continues. To see it again: stillhouse run watch {run.id}. "
            f"To end it: stillhouse run stop {run.id}."
        )
        return 130


def _capitalised(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _code(state: int) -> int:
    from stillhouse.client.core.errors import ExitCode
    from stillhouse.protos.stillhouse.v1.run_pb2 import Run

    codes: dict[int, ExitCode] = {Run.STATE_FAILED: ExitCode.FAILED, Run.STATE_STOPPED: ExitCode.CONFLICT}
    return codes.get(state, ExitCode.OK)


@command(name="stop")
@click.argument("run")
@click.option("--wait", is_flag=True, help="Return once the run has ended.")
def stop(session: Session, run: str, wait: bool) -> None:
    """Ask RUN to write a checkpoint and stop; `run resume` continues."""
    handle = session.run(run)
    after = handle.stop()
    _tell(session, handle, handle.wait() if wait else after)


@command(name="resume")
@click.argument("run")
@click.option("--watch", is_flag=True, help="Follow the run until it ends.")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change a setting from here on, such as optimizer.micro_batch_tokens=2048.",
)
def resume(session: Session, run: str, watch: bool, changes: tuple[str, ...]) -> int:
    """Queue a stopped or failed RUN again, from its last checkpoint.

    With --set it continues with other settings of passes, checkpoints, retries and devices; what changes the model
    that is learnt is refused. An update keeps its rows, however it is cut into passes.
    """
    handle = session.run(run)
    after = handle.resume(*changes)
    if watch:
        return follow(session, handle)
    _tell(session, handle, after)
    return 0


@command(name="delete")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Skip the confirmation, which only a terminal shows.")
def delete(session: Session, runs: tuple[str, ...], yes: bool) -> None:
    """Remove ended runs with their checkpoints, models and logs."""
    handles = [session.run(run) for run in runs]
    names = ", ".join(handle.id for handle in handles)
    if not yes and not session.as_json and sys.stdin.isatty():
        click.confirm(f"Remove {names} and everything they left?", abort=True)
    for handle in handles:
        handle.delete()
        if not session.as_json:
            session.say(f"run {handle.id} deleted")
    if session.as_json:
        session.emit({"deleted": [handle.id for handle in handles]})


def _tell(session: Session, handle: RunHandle, run: Run) -> None:
    from stillhouse.client.core.json_output import as_json
    from stillhouse.client.terminal.run_progress import state_line

    session.show(as_json(run) | {"id": handle.id}, state_line(run))
