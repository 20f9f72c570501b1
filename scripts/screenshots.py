"""Takes the pictures of the page that docs/ shows: `python -m scripts.screenshots URL`, of what `make demo ARGS=--stay` keeps up.

It uploads a dataset, builds a cache, and makes a run that is evaluated on its way and one without a teacher, so that every
page has something to show.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page

from tests.support.chromium import chromium_path, start_chromium

OUT = Path(__file__).resolve().parents[1] / "docs/images/web"
COLOURS = 256
MAX_BYTES = 150_000
NOBODY = "127.0.0.1:1"
PATIENCE_MS = 120_000
SETTLING_MS = 1000
EVALUATED_STEPS = 50


@dataclass(frozen=True, slots=True)
class Shot:
    """A picture of a page from its top on, once `ready` is seen and `act` has been done."""

    path: str
    ready: str = "main"
    act: Callable[[Page], None] | None = None
    scheme: Literal["light", "dark"] = "light"
    width: int = 1280
    height: int = 860


def main() -> int:
    """Writes the pictures, and returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", nargs="*", help="names of pictures")
    options = parser.parse_args()
    path = chromium_path()
    if path is None:
        sys.stderr.write("screenshots: no Chromium is on the PATH; scripts/chromium.sh installs Debian's\n")
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    with httpx.Client(base_url=options.url, timeout=120) as client:
        pictures = dict(_pictures(client))
    large = []
    with start_chromium(path) as browser:
        for name in options.only or pictures:
            target = options.out / f"{name}.png"
            target.write_bytes(_picture(browser, options.url, pictures[name]))
            size = target.stat().st_size
            sys.stdout.write(f"{target} {size:,} bytes\n")
            large += [name] if size > MAX_BYTES else []
    if large:
        sys.stderr.write(
            f"screenshots: {', '.join(large)}: more than {MAX_BYTES:,} bytes; show less of the page\n"
        )
    return bool(large)


def _pictures(client: httpx.Client) -> Iterator[tuple[str, Shot]]:
    """Name of each picture, and what it shows."""
    runs = client.get("/api/v1/runs").raise_for_status().json()["runs"]
    good, other = (_first(runs, kind) for kind in ("distilled", "cross-entropy"))
    spec = good["spec"]
    evaluation = {**spec.get("evaluation", {}), "every_steps": EVALUATED_STEPS}
    watched = _made(client, runs, {**spec, "display_name": "evaluated on the way", "evaluation": evaluation})
    rows = Path(good["effective_spec"]["data"]["train"][0]["path"])
    dataset = _dataset(client, rows)
    lonely = {**spec, "teachers": [{"targets": [NOBODY]}], "retry": {"teacher_wait_s": 0}}
    failed = _made(client, runs, {**lonely, "display_name": "without a teacher"})
    cache = {"path": "caches/stories", "mode": "write_through"}
    _made(client, runs, {**spec, "display_name": "stories' cache", "task": "cache", "cache": cache})
    run, compared = (
        f"/{watched}",
        "&".join(each["name"].replace("runs/", "run=") for each in (good, other)),
    )
    curve = "figure canvas"
    yield "runs", Shot("/")
    yield "runs_dark", Shot("/", scheme="dark")
    yield "runs_phone", Shot("/", width=390)
    yield "run", Shot(run, curve, height=1500)
    yield "run_events", Shot(run, curve, act=_show_events)
    yield "run_failed", Shot(f"/{failed}", "#log-lines li")
    yield "compare", Shot(f"/compare?{compared}", curve, height=1200)
    yield "tokens", Shot(f"{run}/tokens", "#rows .piece", act=_select_token)
    yield (
        "tokens_dark",
        Shot(f"{run}/tokens", "#rows .piece", act=_select_token, scheme="dark"),
    )
    yield (
        "new_run",
        Shot(
            f"/runs/new?from={good['name'].removeprefix('runs/')}",
            "#settings summary",
            act=_await_verdict,
            height=1100,
        ),
    )
    yield "data", Shot("/data")
    yield "dataset", Shot(f"/data/{dataset}", "#found *", act=_inspect, height=1200)
    yield "caches", Shot("/caches", "section")
    yield "teachers", Shot("/teachers", act=_try_prompt, height=1500)
    yield "sign_in", Shot("/sign-in", height=480)


def _first(runs: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The newest completed run whose name begins with `kind`."""
    named = (each for each in runs if each["spec"].get("display_name", "").startswith(kind))
    return next(each for each in named if each["state"] == "COMPLETED")


def _dataset(client: httpx.Client, rows: Path) -> str:
    """Id of the uploaded rows."""
    query = {"file_name": "stories.jsonl", "dataset_id": "stories"}
    if not client.get("/api/v1/datasets/stories").is_success:
        headers = {"content-type": "application/octet-stream"}
        sent = client.post("/api/v1/datasets", params=query, content=rows.read_bytes(), headers=headers)
        sent.raise_for_status()
    return "stories"


def _made(client: httpx.Client, runs: list[dict[str, Any]], spec: Mapping[str, Any]) -> str:
    """Resource name of the run of this display name, made if there is none, once it has ended."""
    for each in runs:
        if each["spec"].get("display_name") == spec["display_name"]:
            return str(each["name"])
    name: str = client.post("/api/v1/runs", json={"spec": spec}).raise_for_status().json()["name"]
    with client.stream("GET", f"/api/v1/{name}/events", timeout=600) as events:
        events.read()
    return name


def _show_events(page: Page) -> None:
    page.get_by_role("heading", name="Settings").click()
    page.wait_for_load_state("networkidle")
    page.get_by_role("heading", name="Attempts and events").evaluate("(element) => element.scrollIntoView()")


def _select_token(page: Page) -> None:
    """Selects the token after training in which the student is farthest from its teacher."""
    pieces = page.locator("#rows section").first.locator(".text").last.locator(".piece")
    pieces.first.wait_for()
    far = pieces.evaluate_all(
        "(all) => all.map((each) => parseFloat(each.title.split(' ')[1]) || 0).reduce((best, kl, at, every) => (kl > every[best] ? at : best), 0)"
    )
    pieces.nth(far).click()


def _await_verdict(page: Page) -> None:
    page.locator("#verdict", has_text="The run is valid.").wait_for()
    page.locator("#memory", has_text="weights;").wait_for()


def _inspect(page: Page) -> None:
    page.get_by_label("Rows", exact=True).fill("2")
    page.get_by_role("button", name="Inspect").click()
    page.locator("#rows .tokens").nth(1).wait_for()


def _try_prompt(page: Page) -> None:
    page.get_by_label("Prompt, or a text to score").fill("It is a rainy day for Bo.")
    page.get_by_label("New tokens, at most").fill("24")
    page.get_by_label("Seed").fill("1")
    page.get_by_role("button", name="Generate").click()
    page.locator("#tried .piece").first.wait_for()
    page.locator("#tried .piece").nth(8).click()


def _picture(browser: Browser, url: str, shot: Shot) -> bytes:
    """A page as PNG, in few colours."""
    context = browser.new_context(
        base_url=url,
        viewport={"width": shot.width, "height": shot.height},
        color_scheme=shot.scheme,
        reduced_motion="reduce",
    )
    page = context.new_page()
    page.set_default_timeout(PATIENCE_MS)
    page.goto(shot.path)
    page.locator(shot.ready).first.wait_for()
    if shot.act is not None:
        shot.act(page)
    page.wait_for_timeout(SETTLING_MS)
    shown = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    context.close()
    file = io.BytesIO()
    shown.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
