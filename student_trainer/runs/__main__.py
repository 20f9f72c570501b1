"""Command line of the run service: settings that cannot work end it with one sentence.

A process for the first run starts before the service is imported.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import click

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rpc.signals import keep_signals
from stillhouse.protos.settings import options_of
from stillhouse.protos.telemetry.logs import configure_logging
from stillhouse.protos.telemetry.tracing import configure_tracing
from stillhouse.student_trainer.runs.data_dir import DataDir
from stillhouse.student_trainer.runs.settings import RunServiceSettings
from stillhouse.student_trainer.runs.supervision.first_standby import FirstStandby

EXIT_SETTINGS = 2
"""Exit code for settings that cannot work, such as a taken address."""


def _indices(
    _context: click.Context, _parameter: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """Device indices from "0,1"; none from an empty text, None if the flag is not given."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r} is not a list of device indices such as 0,1.")
    return tuple(int(part) for part in parts)


@click.command(context_settings={"auto_envvar_prefix": "STILLHOUSE_TRAINER", "show_default": True})
@options_of(RunServiceSettings, gpus={"callback": _indices, "multiple": False})
def main(**options: Any) -> None:
    """Queue distillation runs, train each in its own process, and report."""
    configure_logging(options["log_level"])
    configure_tracing("stillhouse-trainer")
    try:
        asyncio.run(run(RunServiceSettings(**options)))
    except StillhouseError as error:
        click.echo(f"stillhouse-trainer: {error}", err=True)
        sys.exit(EXIT_SETTINGS)


async def run(settings: RunServiceSettings) -> None:
    """Runs the service until a signal.

    Raises:
        StillhouseError: INVALID_CONFIG for settings that cannot work.
    """
    # Runs of an earlier service are stopped even if the signal comes before they are adopted.
    signals = keep_signals() if settings.stop_runs_on_exit else None
    data_dir = DataDir.open(settings.data_dir)
    try:
        first = FirstStandby.begin(settings, data_dir)
        try:
            from stillhouse.student_trainer.runs.service import serve

            await serve(settings, data_dir, first, signals)
        finally:
            first.standby.close()
    finally:
        data_dir.close()


if __name__ == "__main__":
    main()
