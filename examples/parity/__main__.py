"""`make parity`: shows every row of the two older systems on small real models; the exit code is 1 if one is not shown."""

from __future__ import annotations

import shutil
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import click
from rich.console import Console

from examples.demo.__main__ import signals_as_exceptions
from examples.parity import objectives, system0, system4, task_life
from examples.parity.rows import ROWS, Row
from examples.parity.world import World

console = Console(highlight=False, width=160)
MODULES = (system0, task_life, system4, objectives)
"""Each adds its rows to ROWS."""


def show(row: Row, world: World) -> bool:
    """Prints the row with its evidence, or with what is wrong; true if it was shown."""
    started = time.monotonic()
    try:
        evidence = row.show(world)
    except Exception as error:
        console.print(f"[red]FAIL[/] {row.id:5} {row.title}", soft_wrap=True)
        console.print(f"     {type(error).__name__}: {error}", markup=False, soft_wrap=True)
        return False
    took = time.monotonic() - started
    console.print(f"[green]ok[/]   {row.id:5} {row.title}: {evidence} ({took:.0f} s)", soft_wrap=True)
    return True


@click.command()
@click.option("--engine", type=click.Choice(["hf", "vllm"]), default="hf", show_default=True)
@click.option("--work-dir", type=click.Path(path_type=Path), default=Path(".demo/parity"), show_default=True)
@click.option("--only", default="", help="Ids of rows, with commas.  [default: all]")
def main(*, engine: str, work_dir: Path, only: str) -> None:
    """Show every row of docs/parity.md."""
    chosen = only.split(",") if only else list(ROWS)
    unknown = [each for each in chosen if each not in ROWS]
    if unknown:
        raise click.UsageError(f"no such rows: {', '.join(unknown)}; there are {', '.join(ROWS)}.")
    work = work_dir.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    started = time.monotonic()
    try:
        with signals_as_exceptions(), ExitStack() as stack:
            world = World(work=work, engine=engine, stack=stack)
            failed = [each for each in chosen if not show(ROWS[each], world)]
    except KeyboardInterrupt:
        console.print("parity: interrupted; everything that it started has ended")
        sys.exit(130)
    console.print(
        f"parity: {len(chosen) - len(failed)} of {len(chosen)} rows shown in {time.monotonic() - started:.0f} s"
        + (f"; not shown: {', '.join(failed)}" if failed else "")
    )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
