"""How a command ends that went wrong: one sentence, or with --json one object, on standard error; and its exit code."""

from __future__ import annotations

import sys

import click

from client.errors import exit_code
from client.json_text import dumps, error_as_json
from client.render import printable
from protos.errors import Reason, StillhouseError


def report(error: Exception, *, as_json: bool) -> int | None:
    """Tells of `error`; the exit code, or None for a bug, which keeps its traceback."""
    if not isinstance(error, StillhouseError):
        return None
    if as_json:
        click.echo(dumps({"error": error_as_json(error)}), err=True)
    elif error.reason is Reason.INVALID_SPEC:
        click.echo(printable(error.message), err=True)
    else:
        click.echo(f"Error: {printable(error.message)}", err=True)
    sys.stderr.flush()
    return int(exit_code(error))
