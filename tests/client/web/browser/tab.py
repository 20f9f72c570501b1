"""A tab of the browser: remembers what it must not do, and checks what a page owes to everybody."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import axe_playwright_python
from playwright.sync_api import ConsoleMessage, Locator, Page, Request, expect
from playwright.sync_api import TimeoutError as PlaywrightTimeoutError

AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
SERIOUS = ("serious", "critical")
PHONE = {"width": 390, "height": 844}
PATIENCE_MS = 60_000
"""For what a page shall show: it may wait for a run."""
ACTION_MS = 20_000
MOST_TABS = 80
WIDE = """() => {
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth <= width) return [];
  return [...document.querySelectorAll("body *")]
    .filter((each) => each.getBoundingClientRect().right > width + 1)
    .map((each) => `${each.tagName}#${each.id}.${each.className}`).slice(0, 5);
}"""
"""Elements that reach out of the page, if it scrolls sideways."""
expect.set_options(timeout=PATIENCE_MS)


class Tab:
    """A page of Playwright, `page`, whose console and requests are watched."""

    def __init__(self, page: Page, url: str, refusals: tuple[int, ...] = ()) -> None:
        """`refusals` are the statuses that responses may have, which the console reports as errors."""
        self.page, self._refusals = page, refusals
        self._host = urlsplit(url).netloc
        self.problems: list[str] = []
        page.set_default_timeout(ACTION_MS)
        page.on("console", self._on_console)
        page.on("pageerror", lambda error: self.problems.append(f"exception: {error}"))
        page.on("request", self._on_request)

    def check(self) -> None:
        """Fails for errors on the console, exceptions, and requests to other hosts."""
        assert not self.problems, self.problems

    def get(self, role: Any, name: str, **options: Any) -> Locator:
        """The element of a role and name."""
        return self.page.get_by_role(role, name=name, **options)

    def shown(self, text: str) -> None:
        """Waits until the page shows `text`."""
        expect(self.page.get_by_text(text).first).to_be_visible()

    def tab_to(self, wanted: Locator) -> None:
        """Presses Tab until `wanted` has the focus; fails if it never gets it."""
        for _ in range(MOST_TABS):
            self.page.keyboard.press("Tab")
            if wanted.evaluate("(element) => element === document.activeElement"):
                return
        raise AssertionError(f"{wanted} is not reached with {MOST_TABS} Tabs")

    def check_looks(self) -> None:
        """Fails for serious violations of axe-core, light and dark, and for a page that is wider than a phone."""
        for scheme in ("light", "dark"):
            self.page.emulate_media(color_scheme=scheme)
            self.check_accessible(scheme)
        size = self.page.viewport_size
        self.page.set_viewport_size(PHONE)  # type: ignore[arg-type]
        self.check_width()
        if size is not None:
            self.page.set_viewport_size(size)

    def check_accessible(self, what: str = "") -> None:
        """Fails for serious and critical violations of axe-core."""
        self.page.evaluate(AXE)
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations'], reporter: 'v2'})")
        serious = [
            (each["id"], [node["target"] for node in each["nodes"]][:3], each["nodes"][0]["failureSummary"])
            for each in found["violations"]
            if each["impact"] in SERIOUS
        ]
        assert not serious, f"{self.page.url} {what}: {json.dumps(serious, indent=1)}"

    def check_width(self) -> None:
        """Fails if the page scrolls sideways once it has been laid out."""
        with suppress(PlaywrightTimeoutError):
            self.page.wait_for_function(f"({WIDE})().length === 0")
        wide = self.page.evaluate(WIDE)
        assert not wide, f"{self.page.url} is wider than {self.page.viewport_size}: {wide}"

    def _on_console(self, message: ConsoleMessage) -> None:
        if message.type not in ("error", "warning"):
            return
        expected = [f"the server responded with a status of {status} " for status in self._refusals]
        if not any(each in message.text for each in expected):
            self.problems.append(f"console: {message.text} {message.location.get('url', '')}")

    def _on_request(self, request: Request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("data", "blob") and address.netloc != self._host:
            self.problems.append(f"request to {request.url}")
