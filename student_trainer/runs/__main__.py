"""Starts the run service: flags and environment become settings, and a setting that cannot work ends it with one sentence."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rpc.tls import ServerTls
from stillhouse.protos.telemetry.logs import configure_logging
from stillhouse.protos.telemetry.tracing import configure_tracing
from stillhouse.student_trainer.runs.service import ServiceOptions, serve

_PATH = click.Path(path_type=Path)
_DEFAULTS = ServiceOptions(data_dir=Path())
LEAST_SILENCE_S = 15.0
"""Three times what lies between two signs of life."""
EXIT_SETTINGS = 2
"""What cannot work with these settings, such as an address that is taken."""


def _indices(_context: click.Context, _parameter: click.Parameter, value: str | None) -> Sequence[int] | None:
    """Device indices from "0,1"; none from an empty text, None if the flag is not given."""
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter(f"{value!r} is no list of device indices such as 0,1.")
    return tuple(int(part) for part in parts)


@click.command(context_settings={"auto_envvar_prefix": "STILLHOUSE_TRAINER", "show_default": True})
@click.option(
    "--data-dir",
    type=_PATH,
    required=True,
    help="Folder for runs, datasets and the database; made if missing.",
)
@click.option(
    "--database",
    help="URL of a PostgreSQL database for runs and their history, such as postgresql://user@host/name; best given as "
    "STILLHOUSE_TRAINER_DATABASE or with its password in ~/.pgpass, since others see arguments.  [default: a file in "
    "--data-dir]",
)
@click.option("--listen", default=_DEFAULTS.listen, help="HOST:PORT or unix:PATH; port 0 means any free one.")
@click.option("--address-file", type=_PATH, help="Written with the bound address once the service is ready.")
@click.option(
    "--gpus", callback=_indices, help='Devices for runs, such as "0,1"; "" for none. Default: visible ones.'
)
@click.option(
    "--cpu-slots", type=click.IntRange(0), default=_DEFAULTS.cpu_slots, help="Runs at once on the CPU."
)
@click.option(
    "--allow-root",
    "allow_roots",
    type=_PATH,
    multiple=True,
    help="Folder below which specs may name models and datasets. Default: / on loopback, else the data directory alone.",
)
@click.option(
    "--stop-grace-s",
    "--stop-grace",
    type=click.FloatRange(0),
    default=_DEFAULTS.stop_grace_s,
    help="Seconds that a run has to write a checkpoint after a stop, before it is signalled.",
)
@click.option(
    "--stop-runs-on-exit",
    is_flag=True,
    help="Stop live runs when the service ends. Without it they go on, and the next start takes them over.",
)
@click.option(
    "--shutdown-grace-s",
    type=click.FloatRange(0),
    default=_DEFAULTS.shutdown_grace_s,
    help="Seconds that calls in progress have when the service ends.",
)
@click.option(
    "--max-upload-bytes",
    type=click.IntRange(1),
    default=_DEFAULTS.max_upload_bytes,
    help="Largest uploaded dataset.",
)
@click.option(
    "--max-calls",
    type=click.IntRange(1),
    default=_DEFAULTS.max_calls,
    help="Calls at once, of which one client gets three quarters; more are refused.",
)
@click.option(
    "--max-log-bytes",
    type=click.IntRange(1),
    default=_DEFAULTS.max_log_bytes,
    help="Log of one attempt of a run; one that writes more is ended.",
)
@click.option(
    "--max-metric-bytes",
    type=click.IntRange(1),
    default=_DEFAULTS.max_metric_bytes,
    help="Metrics and events of a run; one that writes more is ended.",
)
@click.option(
    "--max-silence-s",
    type=click.FloatRange(0),
    default=_DEFAULTS.max_silence_s,
    help="End a run's process that gives no sign of life for so many seconds; 0 for never. It gives one every 5 s.",
)
@click.option(
    "--max-queued-runs",
    type=click.IntRange(1),
    default=_DEFAULTS.max_queued_runs,
    help="Runs that one client may have in the queue.",
)
@click.option(
    "--keep-ended-days",
    type=click.FloatRange(0),
    help="Remove runs and their files so many days after they ended.  [default: never]",
)
@click.option(
    "--tokens",
    type=_PATH,
    help="Tokens that calls need; `stillhouse token create` makes it.  [default: tokens.json in --data-dir, once there]",
)
@click.option(
    "--audit-log", type=_PATH, help="Who did what, as JSON lines.  [default: audit.jsonl in --data-dir]"
)
@click.option("--metrics-host", default=_DEFAULTS.metrics_host, help="Where Prometheus finds metrics.")
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    help="Its port; 0 for none.  [default: 100 above that of --listen]",
)
@click.option(
    "--insecure",
    is_flag=True,
    help="Listen beyond this machine without TLS, or without tokens or certificates of callers.",
)
@click.option("--tls-cert", type=_PATH, help="PEM certificate of the service.")
@click.option("--tls-key", type=_PATH, help="PEM key of the service.")
@click.option(
    "--tls-client-ca", type=_PATH, help="PEM authority that callers' certificates must be signed by."
)
@click.option("--reflection/--no-reflection", default=None, help="Server reflection. Default: on loopback.")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    help="Least level logged.",
)
def main(
    *,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    log_level: str,
    **settings: Any,
) -> None:
    """Queue distillation runs, train each in its own process, and report."""
    if (tls_cert is None) != (tls_key is None):
        raise click.UsageError("--tls-cert and --tls-key go together.")
    if 0 < settings["max_silence_s"] < LEAST_SILENCE_S:
        raise click.UsageError(
            f"--max-silence-s is less than {LEAST_SILENCE_S:g}, which live processes may need."
        )
    if tls_client_ca is not None and tls_cert is None:
        raise click.UsageError("--tls-client-ca needs --tls-cert and --tls-key.")
    tls = ServerTls(cert=tls_cert, key=tls_key, client_ca=tls_client_ca) if tls_cert and tls_key else None
    configure_logging(log_level)
    configure_tracing("stillhouse-trainer")
    options = ServiceOptions(tls=tls, **settings)
    try:
        asyncio.run(serve(options))
    except StillhouseError as error:
        click.echo(f"stillhouse-trainer: {error}", err=True)
        sys.exit(EXIT_SETTINGS)


if __name__ == "__main__":
    main()
