"""`stillhouse data`: the group that holds the commands about files of rows."""

from __future__ import annotations

import click

from stillhouse.client.commands.data import (
    convert,
    export_prompts,
    filter_rows,
    inspect,
    mix,
    parse,
    push,
    registry,
)


@click.group()
def data() -> None:
    """Prepare files of rows, and copy them to the trainer."""


for _command in (
    *(inspect.inspect, mix.mix, export_prompts.export_prompts, parse.parse, filter_rows.filter_rows),
    *(convert.convert, push.push, registry.list_datasets, registry.show, registry.delete),
):
    data.add_command(_command)
