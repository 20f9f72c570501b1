"""`stillhouse run`: the group that holds the commands about runs."""

from __future__ import annotations

import click

from stillhouse.client.commands.run import compare, control, create, files, metrics, push, show


@click.group()
def run() -> None:
    """Create, watch, control and inspect distillation runs.

    RUN is a run's id, the beginning of one that no other run shares, or `latest`, the newest. Where a model is wanted, as by
    `run pull` and `eval`, the newest is one that trains: evaluations and builds of caches do not count.
    """


for _command in (
    *(create.create, create.schema, show.list_runs, show.show, control.watch),
    *(files.logs, files.artifacts, files.pull, files.attach, control.stop, control.resume, control.delete),
    *(metrics.metrics, metrics.plot, push.push, compare.compare),
):
    run.add_command(_command)
