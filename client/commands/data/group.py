"""`stillhouse data`: the group that holds the commands about files of rows."""

from __future__ import annotations

import click

from stillhouse.client.commands.data import inspect, push


@click.group()
def data() -> None:
    """Prepare files of rows, and copy them to the trainer."""


for _command in (inspect.inspect, push.push):
    data.add_command(_command)
