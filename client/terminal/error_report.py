"""Error reporting of commands: a sentence, or with --json an object, on standard error, and the exit code."""

from __future__ import annotations

import sys

import click

from stillhouse.client.core.errors import exit_code
from stillhouse.client.core.json_output import dumps, error_as_json
from stillhouse.client.terminal.render import printable
from stillhouse.protos.errors import Reason, StillhouseError


def report(error: Exception, *, as_json: bool) -> int | None:
    """Prints `error` and returns its exit code; None for a bug, which keeps its traceback."""
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
