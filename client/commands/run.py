"""`stillhouse run`: the group that holds the commands about runs."""

from __future__ import annotations

import click


@click.group()
def run() -> None:
    """Create, watch, steer and read distillation runs.

    RUN is a run's id, the beginning of one that no other run shares, or `latest`.
    """


from client.commands import run_create, run_files, run_list, run_metrics, run_show, run_steer, run_watch  # noqa: E402

for _module in (run_create, run_list, run_show, run_watch, run_files, run_steer, run_metrics):
    for _command in _module.COMMANDS:
        run.add_command(_command)
