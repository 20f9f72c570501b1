"""`stillhouse web`: serves the HTTP API of the services."""

from __future__ import annotations

from pathlib import Path

import click

from stillhouse.client.terminal.session import Session, command

_FILE = click.Path(path_type=Path, dir_okay=False)


@command()
@click.option(
    "--listen", default="127.0.0.1:7400", show_default=True, help="HOST:PORT; port 0 is any free one."
)
@click.option("--https-cert", type=_FILE, help="Certificate chain of this server, PEM.")
@click.option("--https-key", type=_FILE, help="Its key, PEM.")
@click.option("--insecure", is_flag=True, help="Listen beyond loopback without TLS.")
@click.option(
    "--host", "hosts", multiple=True, metavar="NAME", help="Name of this server in browsers; may be repeated."
)
@click.option(
    "--sign-in-file",
    type=_FILE,
    help="File whose line signs in with this server's own token or certificate; made if missing. "
    "[default: web-sign-in beside the config file]",
)
@click.option("--address-file", type=_FILE, help="Written with the URL once the server is ready.")
@click.option(
    "--max-upload-bytes",
    type=click.IntRange(1),
    default=64 * 2**30,
    show_default=True,
    help="Largest dataset that it passes on.",
)
@click.option(
    "--batch-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for files and batches of OpenAI's API; made if missing.  [default: neither is served]",
)
@click.option(
    "--batch-max-bytes",
    type=click.IntRange(1),
    default=16 * 2**30,
    show_default=True,
    help="Limit on all files of --batch-dir.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Lowest level logged.",
)
@click.option("--parent", type=int, hidden=True, help="Process whose end ends this one.")
def web(
    session: Session,
    *,
    listen: str,
    https_cert: Path | None,
    https_key: Path | None,
    insecure: bool,
    hosts: tuple[str, ...],
    sign_in_file: Path | None,
    address_file: Path | None,
    max_upload_bytes: int,
    batch_dir: Path | None,
    batch_max_bytes: int,
    log_level: str,
    parent: int | None,
) -> None:
    """Serve the run service and the teachers over HTTP, until it is interrupted.

    Callers send the tokens of the services. With a token or certificate of its own, and beyond loopback, it serves nobody who
    has none; whoever can read the sign-in file may use its own.
    """
    import asyncio

    from stillhouse.client.core.errors import usage_error
    from stillhouse.client.web.settings import WebSettings
    from stillhouse.protos.telemetry.logs import configure_logging
    from stillhouse.protos.telemetry.tracing import configure_tracing

    try:
        from stillhouse.client.web.server import serve
    except ModuleNotFoundError as error:
        raise usage_error(f'{error.name} is not installed; run `pip install "stillhouse[web]"`.') from error
    configure_logging(log_level)
    configure_tracing("stillhouse-web")
    settings = WebSettings(
        services=session.settings,
        listen=listen,
        https_cert=https_cert,
        https_key=https_key,
        insecure=insecure,
        hosts=hosts,
        sign_in_file=sign_in_file,
        address_file=address_file,
        max_upload_bytes=max_upload_bytes,
        batch_dir=batch_dir,
        batch_max_bytes=batch_max_bytes,
        parent=parent,
    )
    asyncio.run(serve(settings))
