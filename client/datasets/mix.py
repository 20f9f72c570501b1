"""Mixes files of rows: a fraction of each pool, or pools in a ratio; the same seed gives the same bytes."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from pathlib import Path
from typing import BinaryIO, Literal

from stillhouse.client.core.errors import usage_error
from stillhouse.client.datasets.row_files import RowSpool, json_line, no_rows, rows_of, whole_files
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.rows.reading.row_error import row_error

Mode = Literal["pool-fraction", "ratio"]
PLACEHOLDER = "{category}"
PERCENT = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class MixSettings:
    """A mixture; with categories there is one for each of them, in their order."""

    pools: Sequence[str]
    """Files to draw from; `{category}` in a path stands for each category."""
    shares: Sequence[int]
    """For each pool: percent of its rows that are drawn, or its part of the mixture."""
    out: str
    """File to write, JSONL, or a JSON array if its name ends in .json; with `{category}` as the pools."""
    mode: Mode = "pool-fraction"
    """Shares are of each pool, or of the mixture."""
    categories: Sequence[str] = ()
    """Names that stand for `{category}`; none for a single mixture."""
    seed: int = 42
    """Seed of the draws and of the order."""
    seed_per_category: bool = False
    """Draw each category with a seed of its own, so that it does not depend on those before it."""
    num_rows: int | None = None
    """Rows of a mixture in a ratio; None takes as many as the pools allow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """One written file."""

    category: str
    out: Path
    drawn: Sequence[int]
    """Rows from each pool."""
    pool_sizes: Sequence[int]
    """Rows of each pool."""

    @property
    def num_rows(self) -> int:
        """Its rows."""
        return sum(self.drawn)


@dataclass(frozen=True, kw_only=True, slots=True)
class MixSummary:
    """Everything that was written, and what was not."""

    mixtures: Sequence[Mixture]
    skipped: Sequence[tuple[str, Path]]
    """Categories that lack a pool, each with the missing file."""


def mix(settings: MixSettings) -> MixSummary:
    """Mixes and writes every category; one with a missing file is skipped.

    Nothing is written if it raises StillhouseError: for an empty pool, an invalid row, or settings that cannot be met.
    """
    _check(settings)
    skipped: list[tuple[str, Path]] = []
    chosen: list[tuple[str, list[Path]]] = []
    for category in settings.categories or [""]:
        paths = [_path(each, category) for each in settings.pools]
        missing = next((path for path in paths if not path.exists()), None)
        if missing is None:
            chosen.append((category, paths))
        elif settings.categories:
            skipped.append((category, missing))
        else:
            raise usage_error(f"{missing} does not exist. Give a file of rows for each pool.")
    outputs = [_path(settings.out, category) for category, _ in chosen]
    inputs = [path for _, paths in chosen for path in paths]
    mixtures = []
    common = random.Random(settings.seed)  # noqa: S311 - draws that anyone can repeat
    with ExitStack() as stack:
        spools = [
            [_read(path, stack.enter_context(RowSpool(out.parent))) for path in paths]
            for (_, paths), out in zip(chosen, outputs, strict=True)
        ]
        counts = [
            _counts(settings, [len(each) for each in pools], where)
            for pools, (where, _) in zip(spools, chosen, strict=True)
        ]
        with whole_files(outputs, inputs=inputs) as files:
            for (category, _), pools, drawn, out, file in zip(
                chosen, spools, counts, outputs, files, strict=True
            ):
                generator = common
                if settings.seed_per_category:
                    generator = random.Random(f"{settings.seed}/{category}")  # noqa: S311 - as above
                _write(file, _draw(pools, drawn, generator), as_array=out.suffix == ".json")
                sizes = [len(each) for each in pools]
                mixtures.append(Mixture(category=category, out=out, drawn=drawn, pool_sizes=sizes))
    return MixSummary(mixtures=mixtures, skipped=skipped)


def _check(settings: MixSettings) -> None:
    if len(settings.shares) != len(settings.pools):
        raise usage_error(
            f"there are {len(settings.shares)} shares for {len(settings.pools)} pools. Give one share for each."
        )
    if any(each < 1 for each in settings.shares):
        raise usage_error(
            f"shares are {_shares(settings)}; each is at least 1. Leave a pool of no share out."
        )
    if settings.mode == "pool-fraction" and max(settings.shares) > PERCENT:
        raise usage_error(
            f"shares are {_shares(settings)}; of a pool's rows at most {PERCENT} percent can be drawn. Lower them, or mix in a "
            "ratio."
        )
    if settings.mode == "pool-fraction" and settings.num_rows is not None:
        raise usage_error("a number of rows applies to mixtures in a ratio. Leave it out, or mix in a ratio.")
    for path in (*settings.pools, settings.out):
        if bool(settings.categories) != (PLACEHOLDER in path):
            remedy = "Write it where the category stands" if settings.categories else "Name the categories"
            raise usage_error(f"{path} {'lacks' if settings.categories else 'has'} {PLACEHOLDER}. {remedy}.")
    for first, second in pairwise(sorted(settings.categories)):
        if first == second:
            raise usage_error(f"the category {first} is given twice. Give it once.")
    for category in settings.categories:
        if not category or "/" in category or category in (".", ".."):
            raise usage_error(
                f"{category!r} is no category. Give a name that can be a part of a file's name."
            )


def _shares(settings: MixSettings) -> str:
    return ":".join(map(str, settings.shares))


def _path(template: str, category: str) -> Path:
    return Path(template.replace(PLACEHOLDER, category))


def _read(path: Path, spool: RowSpool) -> RowSpool:
    for number, values in rows_of(path):
        try:
            spool.add(json_line(values))
        except FieldError as error:
            raise row_error(path, number, error.field, error.problem) from error
    if not len(spool):
        raise no_rows(path)
    return spool


def _counts(settings: MixSettings, sizes: Sequence[int], category: str) -> list[int]:
    """Returns the number of rows to draw from each pool. Raises StillhouseError if there would be none."""
    if settings.mode == "pool-fraction":
        # The product is truncated, not rounded, as the recipe has it.
        counts = [int(size * (share / PERCENT)) for size, share in zip(sizes, settings.shares, strict=True)]
    else:
        counts = _in_ratio(settings.shares, sizes, settings.num_rows)
    if not sum(counts):
        where = f" of {category}" if category else ""
        if settings.mode == "pool-fraction":
            raise usage_error(
                f"{_shares(settings)} percent of pools{where} with {' and '.join(map(str, sizes))} rows is no row at all. Give "
                "larger shares or pools, or mix in a ratio."
            )
        raise usage_error(
            f"{_shares(settings)} of pools{where} with {' and '.join(map(str, sizes))} rows is no row at all. Give larger pools."
        )
    return counts


def _in_ratio(shares: Sequence[int], sizes: Sequence[int], num_rows: int | None) -> list[int]:
    """Splits `num_rows`, or as many as the pools have, in a ratio; parts are rounded by largest remainder."""
    total = sum(shares)
    most = min(Fraction(size * total, share) for size, share in zip(sizes, shares, strict=True))
    wanted = int(most) if num_rows is None else num_rows
    while True:
        exact = [Fraction(wanted * share, total) for share in shares]
        counts = [int(each) for each in exact]
        by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - exact[index])
        for index in by_remainder[: wanted - sum(counts)]:
            counts[index] += 1
        lacking = [index for index, count in enumerate(counts) if count > sizes[index]]
        if not lacking:
            return counts
        if num_rows is not None:
            raise usage_error(
                f"{num_rows} rows in the ratio {':'.join(map(str, shares))} need {counts[lacking[0]]} of pool "
                f"{lacking[0] + 1}, which has {sizes[lacking[0]]}. Ask for at most {int(most)} rows."
            )
        wanted -= 1


def _draw(pools: Sequence[RowSpool], counts: Sequence[int], generator: random.Random) -> Iterator[bytes]:
    """Yields the drawn rows in a random order: each pool sampled without replacement, in turn, then all shuffled."""
    # A sample of positions takes the same random numbers as one of the rows themselves; those of later pools follow.
    begins = list(accumulate((len(pool) for pool in pools), initial=0))
    drawn: list[int] = []
    for pool, begin, count in zip(pools, begins, counts, strict=False):
        drawn += (begin + index for index in generator.sample(range(len(pool)), count))
    generator.shuffle(drawn)
    for place in drawn:
        index = bisect_right(begins, place) - 1
        yield pools[index].line(place - begins[index])


def _write(file: BinaryIO, lines: Iterator[bytes], *, as_array: bool) -> None:
    if not as_array:
        file.writelines(lines)
        return
    for index, line in enumerate(lines):
        file.write((b"[\n" if index == 0 else b",\n") + line.rstrip(b"\n"))
    file.write(b"\n]\n")
