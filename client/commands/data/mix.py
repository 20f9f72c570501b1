"""`stillhouse data mix`: mixes files of rows, by category or not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stillhouse.client.terminal.session import Session, command

if TYPE_CHECKING:
    from stillhouse.client.datasets.mix import Mixture, Mode

CATEGORIES = (
    "banks",
    "households",
    "insurance_companies",
    "investment_advisors",
    "mutual_funds",
    "other",
    "pension_funds",
)
LAYOUTS = {
    "artifacts": (
        ("artifacts/grpo/grpo_{category}.jsonl", "artifacts/sft/sft_train_{category}.jsonl"),
        "artifacts/distill_data/raw/train_mix_{category}.jsonl",
    ),
    "data": (("data/grpo_data.json", "data/sft_data.json"), "data/mixed/train_mix.json"),
}
"""Pools and output of the two trees of the GRPO and SFT recipe."""
DEFAULT_SHARES = (70, 30)
_SHARES = re.compile(r"[0-9]{1,9}(:[0-9]{1,9})*")


@command(name="mix")
@click.argument("pools", metavar="[SHARES] POOL...", nargs=-1)
@click.option("--out", default="", help="File to write: JSONL, or a JSON array if it ends in .json.")
@click.option(
    "--mode",
    type=click.Choice(["pool-fraction", "ratio"]),
    default="pool-fraction",
    help="SHARES are percent of each pool's rows, or parts of the mixture.  [default: pool-fraction]",
)
@click.option(
    "--category", "categories", multiple=True, metavar="NAME", help="Stands for {category}; may be repeated."
)
@click.option(
    "--rows", "num_rows", type=click.IntRange(1), default=None, help="Rows of each mixture, in a ratio."
)
@click.option("--seed", type=int, default=42, show_default=True, help="Seed of draws and order.")
@click.option(
    "--seed-per-category", is_flag=True, help="Draw each category alone, whatever categories come before it."
)
@click.option(
    "--layout",
    type=click.Choice(sorted(LAYOUTS)),
    default=None,
    help="Pools, output and categories of the GRPO and SFT recipe, below --root.",
)
@click.option(
    "--root", type=click.Path(path_type=Path), default=Path(), help="Folder of --layout.  [default: .]"
)
def mix(
    session: Session,
    *,
    pools: tuple[str, ...],
    out: str,
    mode: Mode,
    categories: tuple[str, ...],
    num_rows: int | None,
    seed: int,
    seed_per_category: bool,
    layout: str | None,
    root: Path,
) -> int:
    """Mix the rows of each POOL into one shuffled file, or one for each category.

    SHARES such as 70:30 come before the pools; two pools have 70:30 by default. With --mode pool-fraction 70 percent of the
    first pool's rows and 30 of the second's are drawn, each rounded down; with --mode ratio 70 percent of the rows written are
    of the first. `{category}` in the paths stands for each --category, in their order.

    A category without one of its files is skipped and the exit code is 1; an empty file ends the command. Files are written
    at the end, or not at all.
    """
    from stillhouse.client.datasets.mix import MixSettings
    from stillhouse.client.datasets.mix import mix as mix_files

    shares: tuple[int, ...] = ()
    if pools and _SHARES.fullmatch(pools[0]):
        shares, pools = tuple(map(int, pools[0].split(":"))), pools[1:]
    if layout is not None:
        if pools or out:
            raise click.UsageError("--layout names pools and output; leave them out.")
        names, name = LAYOUTS[layout]
        pools, out = tuple(str(root / each) for each in names), str(root / name)
        categories = categories or (CATEGORIES if "{category}" in name else ())
    if not pools or not out:
        raise click.UsageError("give at least one POOL and --out FILE, or --layout.")
    if not shares and len(pools) != len(DEFAULT_SHARES):
        if ":" in pools[0] and not Path(pools[0]).exists():
            raise click.UsageError(
                f'"{pools[0]}" are no SHARES: whole numbers of at most nine digits between colons, such as 70:30.'
            )
        raise click.UsageError(f"give the SHARES of {len(pools)} pools before them, such as 50:30:20.")
    summary = mix_files(
        MixSettings(
            pools=pools,
            shares=shares or DEFAULT_SHARES,
            out=out,
            mode=mode,
            categories=categories,
            seed=seed,
            seed_per_category=seed_per_category,
            num_rows=num_rows,
        )
    )
    for category, missing in summary.skipped:
        session.note(f"{category}: skipped, since {missing} does not exist.")
    if session.as_json:
        session.emit(
            {
                "mixtures": [_as_json(each) for each in summary.mixtures],
                "skipped": [
                    {"category": category, "missing": str(path)} for category, path in summary.skipped
                ],
            }
        )
    for each in summary.mixtures:
        if not session.as_json:
            session.say(_text(each))
    return 1 if summary.skipped else 0


def _as_json(mixture: Mixture) -> dict[str, object]:
    return {
        "category": mixture.category,
        "out": str(mixture.out),
        "rows": mixture.num_rows,
        "drawn": list(mixture.drawn),
        "pool_sizes": list(mixture.pool_sizes),
    }


def _text(mixture: Mixture) -> str:
    parts = " + ".join(
        f"{count} of {size}" for count, size in zip(mixture.drawn, mixture.pool_sizes, strict=True)
    )
    return f"{mixture.out}: {mixture.num_rows} rows, {parts}"
