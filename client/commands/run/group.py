"""`stillhouse run`: the group that holds the commands about runs."""

from __future__ import annotations

import click


@click.group()
def run() -> None:
    """Create, watch, control and inspect distillation runs.

    RUN is a run's id, the beginning of one that no other run shares, or `latest`.
    """


from stillhouse.client.commands.run import control, create, files, show, watch  # noqa: E402
from stillhouse.client.commands.run import list as run_list  # noqa: E402
from stillhouse.client.commands.run import metrics as run_metrics  # noqa: E402

for _module in (create, run_list, show, watch, files, control, run_metrics):
    for _command in _module.COMMANDS:
        run.add_command(_command)
