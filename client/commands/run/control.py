"""`stillhouse run stop | resume | delete`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from stillhouse.client.commands.run.watch import follow
from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.client.trainer.run_handle import RunHandle
    from stillhouse.protos.stillhouse.v1.run_pb2 import Run


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
def resume(session: Session, run: str, watch: bool) -> int:
    """Queue a stopped or failed RUN again, from its last checkpoint."""
    handle = session.run(run)
    after = handle.resume()
    if watch:
        return follow(session, handle)
    _tell(session, handle, after)
    return 0


@command(name="delete")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True)
@click.option("--yes", is_flag=True, help="Do not ask. It is only asked on a terminal.")
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
