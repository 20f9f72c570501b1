"""`stillhouse run metrics | plot`: a run's history as a table, as JSON or as curves."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.client.trainer.run_handle import Series

TABLE_STEPS = 20
PLOT_LINES = 16
MAIN = ("train/loss", "eval/kl", "eval/perplexity", "eval/agreement")

_key = click.option(
    "--key", "keys", multiple=True, metavar="NAME", help="A metric, such as eval/kl; may be repeated."
)
_start = click.option("--start-step", type=click.IntRange(0), default=0, help="First step.")
_end = click.option(
    "--end-step", type=click.IntRange(0), default=0, help="Step before which to end; 0 means none."
)


@command(name="metrics")
@click.argument("run")
@_key
@_start
@_end
@click.option(
    "--max-points",
    type=click.IntRange(1),
    default=None,
    help=f"Steps in the table, {TABLE_STEPS} by default; with --json points of each metric, 1000 by default.",
)
def metrics(
    session: Session,
    *,
    run: str,
    keys: tuple[str, ...],
    start_step: int,
    end_step: int,
    max_points: int | None,
) -> None:
    """Show RUN's metrics by step.

    The table has loss and evaluation, or what --key names; --json has every metric.
    """
    points = (max_points or 0) if session.as_json else 0
    series = session.run(run).metrics(*keys, start_step=start_step, end_step=end_step, max_points=points)
    if session.as_json:
        session.emit({"series": {key: _as_json(each) for key, each in series.items()}})
        return
    if not series:
        session.say("There are no such metrics yet." if keys else "There are no metrics yet.")
        return
    shown = [key for key in (keys or MAIN) if key in series] or list(series)
    session.say(_table({key: series[key] for key in shown}, max_points or TABLE_STEPS))
    others = [key for key in series if key not in shown]
    if others:
        session.say(f"\n--key shows others: {', '.join(others)}")


@command(name="plot")
@click.argument("run")
@_key
@_start
@_end
def plot(session: Session, *, run: str, keys: tuple[str, ...], start_step: int, end_step: int) -> None:
    """Draw RUN's metrics as curves.

    Those are loss and evaluation, or what --key names.
    """
    series = session.run(run).metrics(start_step=start_step, end_step=end_step)
    shown = {key: _finite(series[key]) for key in (keys or MAIN) if key in series}
    shown = {key: each for key, each in shown.items() if len(each.steps)}
    if session.as_json:
        session.emit({"series": {key: _as_json(each) for key, each in shown.items()}})
    elif not shown:
        known = ", ".join(sorted(series)) or "none yet"
        session.say(f"There is nothing to draw; the run has these metrics: {known}.")
    else:
        for key, each in shown.items():
            click.echo(_curve(key, each))


def _finite(series: Series) -> Series:
    import numpy as np

    from stillhouse.client.trainer.run_handle import Series

    kept = np.isfinite(series.values)
    return Series(steps=series.steps[kept], values=series.values[kept])


def _as_json(series: Series) -> dict[str, list[Any]]:
    return {"steps": series.steps.tolist(), "values": series.values.tolist()}


def _table(series: dict[str, Series], max_steps: int) -> str:
    from stillhouse.client.terminal.render import columns, number_text

    cells = {
        key: dict(zip(each.steps.tolist(), each.values.tolist(), strict=True)) for key, each in series.items()
    }
    rows = [
        [str(step), *(number_text(column[step]) if step in column else "" for column in cells.values())]
        for step in _steps(list(cells.values()), max_steps)
    ]
    return columns(rows, header=("step", *cells))


def _steps(cells: Sequence[Mapping[int, float]], most: int) -> list[int]:
    """At most `most` of the steps: first those at which more columns have a value, such as evaluations."""
    filled = Counter(step for column in cells for step in column)
    kept: list[int] = []
    for count in sorted(set(filled.values()), reverse=True):
        alike = sorted(step for step in filled if filled[step] == count)
        kept += _evenly(alike, most - len(kept))
    return sorted(kept)


def _evenly(steps: Sequence[int], most: int) -> list[int]:
    """At most `most` of them, the last of equal parts."""
    parts = min(most, len(steps))
    return [steps[(part + 1) * len(steps) // parts - 1] for part in range(parts)]


def _curve(key: str, series: Series) -> str:
    import plotext

    width = min(shutil.get_terminal_size((100, 24)).columns, 120)
    figure = plotext.figure
    figure.clear()
    curve = figure.signal(series.steps.tolist(), series.values.tolist())
    curve.lines()
    figure.draw(curve).title(key).label("step").theme("colorless").plot_size(width, PLOT_LINES)
    drawn = str(figure.build())
    return drawn if sys.stdout.isatty() else str(plotext.uncolorize(drawn))
