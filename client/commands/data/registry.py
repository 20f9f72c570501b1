"""`stillhouse data list | show | delete`: datasets that the trainer stores."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import click

from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.protos.stillhouse.v1 import run_pb2

SHOWN_DIGEST_CHARS = 12


@command(name="list")
@click.argument("dataset_id", metavar="[ID]", default="")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Most datasets to show.")
def list_datasets(session: Session, dataset_id: str, limit: int) -> None:
    """List the trainer's datasets, newest first, or the versions of one ID."""
    from stillhouse.client.core.json_output import as_json
    from stillhouse.client.terminal.render import columns, size_text, time_text

    found = list(islice(session.trainer.datasets(_id_of(dataset_id)), limit))
    rows = [
        (
            _short_name(each),
            _count(each.num_rows),
            _count(each.num_tokens),
            size_text(each.size_bytes),
            each.owner or "-",
            time_text(each.create_time),
            each.file_name,
        )
        for each in found
    ]
    header = ("NAME", "ROWS", "TOKENS", "SIZE", "OWNER", "CREATED", "FILE")
    table = columns(
        rows, header=header, empty="There are no datasets yet; `stillhouse data push` uploads one."
    )
    session.show({"datasets": [as_json(each) for each in found]}, table)


@command(name="show")
@click.argument("dataset")
def show(session: Session, dataset: str) -> None:
    """Show one DATASET: `gsm8k` for the newest version, `gsm8k@2`, or a digest; with or without `datasets/` before it."""
    from stillhouse.client.core.json_output import as_json
    from stillhouse.client.terminal.render import columns, size_text, time_text

    found = session.trainer.dataset(_name_of(dataset))
    facts = [
        ("name", found.name),
        ("file", found.file_name),
        ("size", size_text(found.size_bytes)),
        ("rows", _count(found.num_rows)),
        ("tokens", _count(found.num_tokens)),
        ("owner", found.owner or "-"),
        ("created", time_text(found.create_time)),
        ("SHA-256", found.sha256),
        ("used by", ", ".join(found.live_runs) or "-"),
    ]
    session.show(as_json(found), columns(facts))


@command(name="delete")
@click.argument("datasets", metavar="DATASET...", nargs=-1, required=True)
def delete(session: Session, datasets: tuple[str, ...]) -> None:
    """Delete each DATASET, with its version: `gsm8k@2`, or a digest.

    Its file goes with the last dataset of the same content. A dataset of a run that is not completed stays.
    """
    names = [_name_of(each) for each in datasets]
    for name in names:
        session.trainer.delete_dataset(name)
        if not session.as_json:
            session.say(f"Deleted {name}.")
    if session.as_json:
        session.emit({"deleted": names})


def _name_of(dataset: str) -> str:
    return dataset if dataset.startswith("datasets/") else f"datasets/{dataset}"


def _id_of(dataset: str) -> str:
    return dataset.removeprefix("datasets/")


def _short_name(dataset: run_pb2.Dataset) -> str:
    """Returns `gsm8k@2`, or the digest of a dataset without an id, short."""
    name = _id_of(dataset.name)
    return f"{name[:SHOWN_DIGEST_CHARS]}…" if name == dataset.sha256 else name


def _count(number: int) -> str:
    return f"{number:,}" if number else "-"
