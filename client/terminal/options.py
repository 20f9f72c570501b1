"""Connection options that every command shares."""

from __future__ import annotations

import click


def shared_options(*, hidden: bool) -> list[click.Option]:
    """Returns the options that locate the services; every command takes them too, without listing them."""
    described = {
        "--trainer": ("HOST:PORT", "Run service. [default: 127.0.0.1:7402]"),
        "--teacher": (
            "HOST:PORT[,...]",
            "Teacher service, or several of one teacher. [default: 127.0.0.1:7401]",
        ),
        "--context": ("NAME", "Section [contexts.NAME] of the config file."),
        "--config": ("FILE", "Config file. [default: ~/.config/stillhouse/config.toml]"),
        "--tls-ca": ("FILE", "Authorities to trust, PEM."),
        "--tls-cert": ("FILE", "Certificate of this client, PEM."),
        "--tls-key": ("FILE", "Key of that certificate, PEM."),
        "--tls-server-name": ("NAME", "Name to expect in the service's certificate."),
        "--token-file": ("FILE", "File that holds a bearer token."),
    }
    options = [
        click.Option([flag, f"shared_{_name(flag)}"], metavar=metavar, help=text, hidden=hidden)
        for flag, (metavar, text) in described.items()
    ]
    tls = click.Option(
        ["--tls/--no-tls", "shared_tls"],
        default=None,
        help="TLS with the system's authorities.",
        hidden=hidden,
    )
    return [*options, tls]


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")
