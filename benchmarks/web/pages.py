"""Whole-page times in Chromium on a large history: `python -m benchmarks.web.pages`, or `make bench-web`.

Each figure is the median of several visits by browsers with empty caches, from the start of the navigation until the page
has loaded, or its first curve is drawn.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from playwright.sync_api import Browser

from benchmarks.web.history import fill, id_of
from tests.client.web.conftest import start_web
from tests.support.chromium import chromium_path, start_chromium
from tests.support.programs import start_trainer

MAX_STORE_BYTES = 4 * 2**30
MAX_LIST_MS, MAX_CURVE_MS = 300.0, 1000.0
WHEN_DRAWN = """
addEventListener("DOMContentLoaded", () => {
  const look = () => {
    const canvas = document.querySelector("figure:not([hidden]) canvas");
    if (canvas) requestAnimationFrame(() => requestAnimationFrame(() => { document.documentElement.dataset.drawnMs = performance.now(); }));
    else requestAnimationFrame(look);
  };
  look();
});
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Visit:
    """Times of a page, in milliseconds from the start of its navigation."""

    answered: float
    """The document has arrived."""
    loaded: float
    """All of it has, scripts and styles included."""
    drawn: float
    """Its first curve is on the screen; 0 on pages without curves."""


@click.command()
@click.option("--runs", default=2000, help="Ended runs.")
@click.option("--points", default=1_000_000, help="Metric points of the newest of them.")
@click.option("--points-of-others", default=100, help="Metric points of each other run.")
@click.option("--visits", default=7, help="Visits of each page.")
@click.option(
    "--history",
    type=click.Path(path_type=Path),
    help="Keep the runs in this folder, and measure those that are there already.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Also write the figures there.")
def main(
    *,
    runs: int,
    points: int,
    points_of_others: int,
    visits: int,
    history: Path | None,
    json_path: Path | None,
) -> None:
    """Measure the list of runs, a run and a comparison."""
    browser_path = chromium_path()
    if browser_path is None:
        sys.exit("bench-web: no Chromium is on the PATH; scripts/chromium.sh installs Debian's.")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = history or root / "data"
        if not data.exists():
            _fill(data, runs, points, points_of_others)
        large = id_of(runs - 1)
        with (
            start_trainer(data, directory=root, options=["--cpu-slots", "0"]) as trainer,
            start_web(root, trainer.target, "--log-level", "warning", environment={}) as web,
            start_chromium(browser_path) as browser,
        ):
            figures = measure(browser, web.target, large, visits)
    figures_are_good = show(figures)
    if json_path is not None:
        json_path.write_text(
            json.dumps({name: asdict(each) for name, each in figures.items()}, indent=2) + "\n"
        )
    sys.exit(not figures_are_good)


def _fill(data: Path, runs: int, points: int, points_of_others: int) -> None:
    """Makes the data directory, in memory first."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(dir=_quick_folder()) as quick:
        fill(Path(quick) / "data", runs, points, points_of_others)
        shutil.copytree(Path(quick) / "data", data)
    print(
        f"{runs:,} runs, one of {points:,} points, stored in {time.monotonic() - began_s:.0f} s", flush=True
    )


def _quick_folder() -> str | None:
    """A folder in memory if it is large enough: filling waits for the disk ten thousand times."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > MAX_STORE_BYTES else None


def measure(browser: Browser, url: str, large: str, visits: int) -> dict[str, Visit]:
    """Median times by page."""
    small = id_of(0)
    pages = {
        "list": "/",
        "list, failed runs": "/?state=FAILED",
        "list, a text that few have": "/?text=sweep+7,",
        "list, a label": "/?label=team%3Dada",
        "run with the many points": f"/runs/{large}",
        "run with few points": f"/runs/{small}",
        "comparison of both": f"/compare?run={large}&run={small}",
    }
    return {name: visit(browser, url + path, visits) for name, path in pages.items()}


def visit(browser: Browser, url: str, visits: int) -> Visit:
    """Median times of a page."""
    has_curves = "/runs/" in url or "/compare" in url
    found = []
    for _ in range(visits):
        context = browser.new_context()
        page = context.new_page()
        page.add_init_script(WHEN_DRAWN)
        page.goto(url)
        drawn = 0.0
        if has_curves:
            page.locator("html[data-drawn-ms]").wait_for(state="attached")
            drawn = float(page.locator("html").get_attribute("data-drawn-ms") or "nan")
        timing = page.evaluate("performance.getEntriesByType('navigation')[0].toJSON()")
        found.append(Visit(answered=timing["responseEnd"], loaded=timing["loadEventEnd"], drawn=drawn))
        context.close()
    return Visit(
        **{name: statistics.median(getattr(each, name) for each in found) for name in Visit.__slots__}
    )


def show(figures: dict[str, Visit]) -> bool:
    """Prints a table; True if every page is within its limit."""
    print(f"{'page':30} {'answered':>10} {'loaded':>10} {'curve drawn':>12}   milliseconds, medians")
    good = True
    for name, each in figures.items():
        limit, value = (MAX_CURVE_MS, each.drawn) if each.drawn else (MAX_LIST_MS, each.loaded)
        within = value <= limit
        good &= within
        drawn = f"{each.drawn:.0f}" if each.drawn else "-"
        note = "" if within else f"   more than {limit:.0f}"
        print(f"{name:30} {each.answered:10.0f} {each.loaded:10.0f} {drawn:>12}{note}", flush=True)
    return good


if __name__ == "__main__":
    main()
