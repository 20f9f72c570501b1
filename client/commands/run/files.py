"""`stillhouse run logs | artifacts | pull | attach`: a run's log and files."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path

import click

from stillhouse.client.terminal.session import Session, command


@command(name="logs")
@click.argument("run")
@click.option("-f", "--follow", is_flag=True, help="Stay until the run ends.")
@click.option("--attempt", type=click.IntRange(0), default=0, help="Only this attempt; 0 means all of them.")
@click.option("--tail-bytes", type=click.IntRange(1), default=None, help="Only the last bytes, this many.")
def logs(session: Session, run: str, follow: bool, attempt: int, tail_bytes: int | None) -> int:
    """Print RUN's log: for reading on a terminal, else as it was written, one JSON object a line.

    With --json each piece is one line with its text and `next_offset`, the byte after it.
    """
    from stillhouse.client.terminal.log_text import LogText

    shown = LogText() if sys.stdout.isatty() else None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    handle = session.run(run)

    def on_lost(error: Exception, pause_s: float) -> None:
        session.note(f"{error} Trying again in {pause_s:.0f} s; the run is not affected.")

    start = -tail_bytes if tail_bytes else 0
    try:
        for piece in handle.logs(follow=follow, attempt=attempt, start_offset=start, on_lost=on_lost):
            text = decoder.decode(piece.data)
            if session.as_json:
                session.emit({"text": text, "next_offset": piece.next_offset})
            else:
                _write(shown.add(text) if shown else text)
        if shown:
            _write(shown.end())
    except KeyboardInterrupt:
        session.note(f"\nNo longer following; run {handle.id} continues.")
        return 130
    return 0


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@command(name="artifacts")
@click.argument("run")
def artifacts(session: Session, run: str) -> None:
    """List the files that RUN produced."""
    from stillhouse.client.core.json_output import as_json
    from stillhouse.client.terminal.render import columns, size_text

    found = session.run(run).artifacts()
    rows = [(each.path, size_text(each.size_bytes), each.sha256[:12]) for each in found]
    table = columns(rows, header=("PATH", "SIZE", "SHA-256"), empty="The run has no files yet.")
    session.show({"artifacts": [as_json(each) for each in found]}, table)


@command(name="pull")
@click.argument("run")
@click.argument("what", default="final")
@click.option(
    "--to",
    "directory",
    type=click.Path(),
    default=None,
    help="Directory; of one file its name, or with a / at the end its directory.  [default: ./RUN/WHAT]",
)
def pull(session: Session, run: str, what: str, directory: str | None) -> None:
    """Copy RUN's final model to this machine.

    WHAT may also be "checkpoints/120", say, whose model is copied without the optimizer, or one file of `run artifacts`. An interrupted download resumes; each file's SHA-256 is checked.
    """
    from stillhouse.client.terminal.render import printable

    handle = session.run(run, with_model=what == "final")

    def on_file(path: str, size: int, whole: int) -> None:
        is_whole = size == whole
        if session.as_json or not (is_whole or sys.stderr.isatty()):
            return
        share = 100 * size // whole if whole else 100
        click.echo(f"\r{printable(path)} {share} %", nl=is_whole, err=True)

    paths = handle.pull(what, directory, on_file=on_file)
    many = f"{len(paths)} files of run {handle.id} are in {directory or Path(handle.id, what)}"
    session.show(
        {"files": [str(path) for path in paths]},
        many if len(paths) > 1 else f"{paths[0]} is a copy from run {handle.id}",
    )


@command(name="attach")
@click.argument("run")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def attach(session: Session, run: str, file: Path) -> None:
    """Store FILE, a JSON object such as the results of lm-evaluation-harness, with RUN.

    It becomes evaluations/attached/FILE among the run's artifacts, and replaces an earlier one of this name.
    """
    from stillhouse.client.core.json_output import as_json

    handle = session.run(run)
    stored = handle.attach(file)
    session.show(as_json(stored) | {"id": handle.id}, f"{stored.path} is with run {handle.id}")
