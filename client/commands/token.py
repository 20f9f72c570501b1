"""`stillhouse token`: creates, lists and revokes the tokens of a service, in a file on its host that services reload automatically."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import click

from stillhouse.client.terminal.session import Session, command

_PATH = click.Path(path_type=Path)
_UNITS_S = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_FILE = click.option(
    "--file",
    type=_PATH,
    required=True,
    envvar="STILLHOUSE_TOKENS",
    help="The service's tokens file: tokens.json in a trainer's --data-dir, or a service's --tokens.",
)


@click.group()
def token() -> None:
    """Create, list and revoke tokens for a service, on its own host.

    A service with a tokens file requires a token with every call. The file holds hashes, never a token.
    """


def _lifetime(_context: click.Context, _parameter: click.Parameter, value: str) -> float | None:
    """Parses "12h", "90d" or "never" to seconds."""
    if value == "never":
        return None
    match = re.fullmatch(r"(\d{1,6})([mhdw])", value)
    if match is None or int(match[1]) == 0:
        raise click.BadParameter(f"{value!r} is not a time such as 30m, 12h, 90d, 4w or never.")
    return float(int(match[1]) * _UNITS_S[match[2]])


@command(token, name="create")
@_FILE
@click.option("--name", required=True, help="Owner, for quotas, ownership of runs and the audit log.")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["infer", "submit", "admin"]),
    multiple=True,
    required=True,
    help="infer: query a teacher; submit: runs; admin: everything. May be repeated.",
)
@click.option(
    "--expires", callback=_lifetime, default="90d", show_default=True, help="Such as 12h, 90d, 4w or never."
)
@click.option(
    "--to", "target", type=_PATH, help="Write the token to this file, mode 0600, instead of printing it."
)
def create(
    session: Session,
    *,
    file: Path,
    name: str,
    scopes: tuple[str, ...],
    expires: float | None,
    target: Path | None,
) -> None:
    """Create a token; it is shown only once.

    The client reads it from the file named by --token-file or STILLHOUSE_TOKEN_FILE, a training process from the
    token_file of its teacher's section in credentials.toml.
    """
    from stillhouse.client.core.errors import file_errors
    from stillhouse.protos.rpc import tokens as auth_tokens

    descriptor = None
    if target is not None:
        with file_errors("create", target):
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        secret, made = auth_tokens.create(
            file, name=name, scopes=[auth_tokens.Scope(each) for each in scopes], lifetime_s=expires
        )
    except BaseException:
        if target is not None:
            target.unlink()
        raise
    if descriptor is not None:
        with os.fdopen(descriptor, "w") as output:
            output.write(secret + "\n")
    end = None if made.expire_time_s is None else auth_tokens.time_text(made.expire_time_s)
    shown = {"token": secret} if target is None else {"token_file": str(target)}
    facts = {"id": made.id, "name": made.name, "scopes": sorted(made.scopes), "expire_time": end}
    session.note(
        f"token {made.id} of {made.name}: {', '.join(sorted(made.scopes))}; expires {end or 'never'}"
    )
    session.show(shown | facts, secret if target is None else str(target))


@command(token, name="list")
@_FILE
def list_tokens(session: Session, file: Path) -> None:
    """List the tokens of FILE, without their secrets."""
    from stillhouse.client.terminal.render import columns
    from stillhouse.protos.rpc import tokens as auth_tokens

    documents, rows = [], []
    for each in sorted(auth_tokens.read(file).values(), key=lambda each: each.create_time_s):
        facts = {"id": each.id, "name": each.name, "scopes": sorted(each.scopes)}
        created, expired = auth_tokens.time_text(each.create_time_s), each.expired(time.time())
        end = None if each.expire_time_s is None else auth_tokens.time_text(each.expire_time_s)
        documents.append(facts | {"create_time": created, "expire_time": end, "expired": expired})
        expires = f"{end or 'never'}{' (expired)' if expired else ''}"
        rows.append((each.id, each.name, ",".join(sorted(each.scopes)), created, expires))
    header = ("ID", "NAME", "SCOPES", "CREATED", "EXPIRES")
    table = columns(rows, header, empty="There are no tokens: the service refuses every call.")
    session.show({"tokens": documents}, table)


@command(token, name="revoke")
@_FILE
@click.argument("which", metavar="ID|NAME")
def revoke(session: Session, file: Path, which: str) -> None:
    """Revoke a token; the next call with it is refused."""
    from stillhouse.protos.rpc import tokens as auth_tokens

    gone = auth_tokens.revoke(file, which)
    lines = [f"{each.id} of {each.name} is revoked" for each in gone]
    session.show({"revoked": [each.id for each in gone]}, "\n".join(lines))
