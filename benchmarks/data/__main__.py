"""Rows a second of the first start against datasets.map, seconds of the second start, and memory at one and four times the rows.

Each figure is of a process of its own on the same file. datasets.map runs once with a process for each core and once
with the tokenizer's threads, and only tokenizes; ours makes masks, order and split as well. The better of its two
times counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.data.generated import tokenizer_in, write_rows

MAX_SECOND_START_S = 5.0
MAX_MEMORY_RATIO = 1.1
TIMEOUT_S = 7200.0


@click.command()
@click.option(
    "--rows", default=1_000_000, help="Rows of the file; memory is measured at four times as many too."
)
@click.option("--kind", type=click.Choice(["text", "completion"]), default="text")
@click.option(
    "--work", type=click.Path(path_type=Path), default=Path(".bench/data"), help="Folder for files."
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures there.")
@click.option("--keep", is_flag=True, help="Leave prepared files for another look.")
def main(rows: int, kind: str, work: Path, json_path: Path | None, keep: bool) -> None:
    """Measure the preparation of generated rows."""
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_in(work / "tokenizer")
    cores = len(os.sched_getaffinity(0))
    figures: dict[str, Any] = {"rows": rows, "kind": kind, "cores": cores}
    file = write_rows(work / f"{kind}-{rows}.jsonl", rows, kind)
    for name, method in (("map_processes", "map-processes"), ("map_threads", "map-threads")):
        figures[name] = _measure(method, file, tokenizer, _fresh(work / name), cores)
    figures["first"] = _measure("ours", file, tokenizer, _fresh(work / "prepared"), cores)
    figures["second"] = _measure("ours", file, tokenizer, work / "prepared", cores)
    large = write_rows(work / f"{kind}-{4 * rows}.jsonl", 4 * rows, kind)
    figures["first_large"] = _measure("ours", large, tokenizer, _fresh(work / "prepared-large"), cores)
    figures["second_large"] = _measure("ours", large, tokenizer, work / "prepared-large", cores)
    _show(figures)
    if json_path is not None:
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
    if not keep:
        for name in ("map_processes", "map_threads", "prepared", "prepared-large"):
            _fresh(work / name)


def _fresh(folder: Path) -> Path:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _measure(method: str, rows: Path, tokenizer: Path, folder: Path, cores: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.data.measured_process", method, str(rows), str(tokenizer)]
    done = subprocess.run(
        [*command, str(folder), "--cores", str(cores)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT_S,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _show(figures: dict[str, Any]) -> None:
    rows, first, second = figures["rows"], figures["first"], figures["second"]
    peer = min(figures["map_processes"]["seconds"], figures["map_threads"]["seconds"])
    large, second_large = figures["first_large"], figures["second_large"]
    table = Table("", "seconds", "rows/s", "MiB, the process", "MiB, with those it started")
    for name, label, count in (
        ("map_processes", "datasets.map, a process for each core", rows),
        ("map_threads", "datasets.map, the tokenizer's threads", rows),
        ("first", "ours, first start", rows),
        ("second", "ours, second start", rows),
        ("first_large", f"ours, first start, {4 * rows:,} rows", 4 * rows),
        ("second_large", f"ours, second start, {4 * rows:,} rows", 4 * rows),
    ):
        each = figures[name]
        table.add_row(
            label,
            f"{each['seconds']:.1f}",
            f"{count / each['seconds']:,.0f}",
            f"{each['own_mib']:.0f}",
            f"{each['all_mib']:.0f}",
        )
    console = Console(width=120)
    console.print(table)
    for claim, value, holds in (
        ("rows/s over datasets.map's", peer / first["seconds"], peer >= first["seconds"]),
        ("seconds of the second start", second["seconds"], second["seconds"] < MAX_SECOND_START_S),
        (
            "memory at 4 times the rows, first start",
            large["own_mib"] / first["own_mib"],
            large["own_mib"] <= MAX_MEMORY_RATIO * first["own_mib"],
        ),
        (
            "memory at 4 times the rows, second start",
            second_large["own_mib"] / second["own_mib"],
            second_large["own_mib"] <= MAX_MEMORY_RATIO * second["own_mib"],
        ),
    ):
        console.print(f"{claim}: {value:.2f}  {'holds' if holds else 'MISSED'}")


if __name__ == "__main__":
    main()
