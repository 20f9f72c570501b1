"""Takes the pictures of the page that docs/ shows: `python -m scripts.screenshots URL`, of what `make demo ARGS=--stay` keeps up.

It uploads a dataset and makes a run without a teacher, so that every page has something to show.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from playwright.sync_api import Browser, Page

from tests.support.chromium import chromium_path, start_chromium

OUT = Path(__file__).resolve().parents[1] / "docs/images/web"
WIDTH, HEIGHT = 1280, 860
PHONE = {"width": 390, "height": 844}
COLOURS = 96
MAX_BYTES = 150_000
NOBODY = "127.0.0.1:1"


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
        pages = dict(_pages(client))
    large = []
    with start_chromium(path) as browser:
        for name, settings in pages.items():
            if options.only and name not in options.only:
                continue
            target = options.out / f"{name}.png"
            target.write_bytes(_picture(browser, options.url, **settings))
            size = target.stat().st_size
            sys.stdout.write(f"{target} {size:,} bytes\n")
            large += [name] if size > MAX_BYTES else []
    if large:
        sys.stderr.write(
            f"screenshots: {', '.join(large)}: more than {MAX_BYTES:,} bytes; show less of the page\n"
        )
    return bool(large)


def _pages(client: httpx.Client) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name of each picture, and what it shows."""
    runs = client.get("/api/v1/runs").raise_for_status().json()["runs"]
    ended = [each for each in runs if each["state"] == "COMPLETED"]
    distilled = next(each for each in ended if each["spec"].get("display_name", "").startswith("distilled"))
    plain = next(each for each in ended if each["spec"].get("display_name", "").startswith("cross-entropy"))
    good, other = (each["name"].removeprefix("runs/") for each in (distilled, plain))
    dataset = _dataset(client, Path(distilled["effective_spec"]["data"]["train"][0]["path"]))
    failed = _failed(client, runs, distilled["spec"])
    yield "runs", {"path": "/"}
    yield "runs_dark", {"path": "/", "scheme": "dark"}
    yield "runs_phone", {"path": "/", "phone": True}
    yield "run", {"path": f"/runs/{good}", "ready": "figure canvas", "height": 1400}
    yield "run_failed", {"path": f"/runs/{failed}", "ready": "#log-lines li"}
    yield "compare", {"path": f"/compare?run={good}&run={other}", "ready": "figure canvas", "height": 1200}
    yield "new_run", {"path": f"/runs/new?from={good}"}
    yield "data", {"path": "/data"}
    yield "dataset", {"path": f"/data/{dataset}"}
    yield "sign_in", {"path": "/sign-in", "height": 480}


def _dataset(client: httpx.Client, rows: Path) -> str:
    """Id of the uploaded rows."""
    query = {"file_name": "stories.jsonl", "dataset_id": "stories"}
    if not client.get("/api/v1/datasets/stories").is_success:
        headers = {"content-type": "application/octet-stream"}
        client.post(
            "/api/v1/datasets", params=query, content=rows.read_bytes(), headers=headers
        ).raise_for_status()
    return "stories"


def _failed(client: httpx.Client, runs: list[dict[str, Any]], spec: Mapping[str, Any]) -> str:
    """Id of a run that failed for want of a teacher, made if there is none."""
    for each in runs:
        if each["state"] == "FAILED":
            return str(each["name"]).removeprefix("runs/")
    lonely = {**spec, "display_name": "without a teacher", "teachers": [{"targets": [NOBODY]}]}
    lonely["retry"] = {"teacher_wait_s": 0}
    name: str = client.post("/api/v1/runs", json={"spec": lonely}).raise_for_status().json()["name"]
    with client.stream("GET", f"/api/v1/{name}/events") as events:
        events.read()
    return name.removeprefix("runs/")


def _picture(
    browser: Browser,
    url: str,
    *,
    path: str,
    ready: str = "main",
    scheme: Any = "light",
    phone: bool = False,
    height: int = HEIGHT,
) -> bytes:
    """A page as PNG, from its top on, once `ready` is seen; in few colours."""
    size: Any = PHONE if phone else {"width": WIDTH, "height": height}
    context = browser.new_context(base_url=url, viewport=size, color_scheme=scheme, reduced_motion="reduce")
    page: Page = context.new_page()
    page.goto(path)
    page.locator(ready).first.wait_for()
    page.wait_for_load_state("networkidle")
    shown = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    context.close()
    file = io.BytesIO()
    shown.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
