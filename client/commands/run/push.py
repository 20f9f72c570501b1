"""`stillhouse run push`: a run's model on a hub."""

from __future__ import annotations

from pathlib import Path

import click

from stillhouse.client.terminal.session import Session, command


@command(name="push")
@click.argument("run")
@click.argument("repo_id")
@click.option("--what", default="final", show_default=True, help='Also "checkpoints/120", say.')
@click.option("--public", is_flag=True, help="Make a new repository public; it is private without.")
@click.option("--license", "license_id", default=None, help="Licence for the model card, such as apache-2.0.")
@click.option(
    "--base-model",
    metavar="REPO_ID",
    default=None,
    help="Name of an adapter's base on the hub, if the run named it by a path.",
)
@click.option("--message", default=None, help="Message of the commit.  [default: the run's id]")
@click.option(
    "--to",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Directory for the files on their way; kept, as by `run pull`.  [default: ./RUN/WHAT]",
)
def push(
    session: Session,
    run: str,
    repo_id: str,
    *,
    what: str,
    public: bool,
    license_id: str | None,
    base_model: str | None,
    message: str | None,
    directory: Path | None,
) -> None:
    """Copy RUN's final model to REPO_ID, such as me/my-student, on a model hub.

    The model travels over this machine, in one commit. The token is that of HF_TOKEN or of `hf auth login`, the hub that of HF_ENDPOINT. A repository that exists keeps its visibility.
    """
    from stillhouse.client.trainer.hub import push_files

    handle = session.run(run, with_model=True)
    folder = directory or Path(handle.id, what)
    files = handle.pull(what, folder)
    commit = push_files(
        files,
        folder,
        repo_id,
        private=not public,
        message=message or f"Run {handle.id}, {what}",
        license_id=license_id,
        base_model=base_model,
    )
    told = {"url": commit.url, "repo_id": commit.repo_id, "private": commit.is_private}
    visibility = "private" if commit.is_private else "public"
    session.show(told, f"{folder} is in the {visibility} repository {commit.repo_id}: {commit.url}")
