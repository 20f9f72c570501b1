"""`stillhouse data export-prompts`: the prompts of training rows, for `stillhouse generate --in`."""

from __future__ import annotations

from pathlib import Path

import click

from stillhouse.client.terminal.session import Session, command


@command(name="export-prompts")
@click.option("--in", "source", required=True, type=click.Path(path_type=Path), help="File of training rows.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="JSONL file to write.")
@click.option("--chat", is_flag=True, help="Make a user's turn of prompts of text.")
@click.option(
    "--compat",
    is_flag=True,
    help="Write two equal files, STEM_prompts_base.jsonl and STEM_prompts_grpo.jsonl, of id, system and prompt alone.",
)
@click.option("--out-dir", type=click.Path(path_type=Path), default=None, help="Folder of --compat.")
@click.option("--stem", default="", help="Begin of the names of --compat.")
def export_prompts(
    session: Session,
    *,
    source: Path,
    out: Path | None,
    chat: bool,
    compat: bool,
    out_dir: Path | None,
    stem: str,
) -> None:
    """Write the prompt of each row, without its completion, as `stillhouse generate --in` reads it.

    A row is `id` and `prompt`, with `system` if there is one; conversations without a system's turn, or of several turns, are
    `messages`. A row without an id gets its number; an id that comes twice is refused.
    """
    from stillhouse.client.datasets import prompts

    if compat:
        if out is not None or out_dir is None or not stem:
            raise click.UsageError("--compat needs --out-dir DIR and --stem NAME, and excludes --out.")
        if Path(stem).name != stem:
            raise click.UsageError(
                f"--stem {stem!r} is no beginning of a file's name; give the folder with --out-dir."
            )
        outputs = [out_dir / f"{stem}{suffix}" for suffix in prompts.COMPAT_SUFFIXES]
    else:
        if out is None or out_dir is not None or stem:
            raise click.UsageError("give --out FILE; --out-dir and --stem belong to --compat.")
        outputs = [out]
    count = prompts.export_prompts(source, outputs, chat=chat, plain_rows=compat)
    names = [str(each) for each in outputs]
    session.show({"out": names, "rows": count}, "\n".join(f"{each}: {count} prompts" for each in names))
