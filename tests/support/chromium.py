"""A real Chromium, driven by Playwright: Debian's package or whatever the PATH has, never one that Playwright downloads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ("--disable-dev-shm-usage", "--disable-gpu", "--disable-background-networking", "--disable-sync")


def chromium_path() -> str | None:
    """The program; None if there is none on the PATH."""
    return next(filter(None, map(shutil.which, NAMES)), None)


def is_required() -> bool:
    """True in CI, where a suite without these tests would pass for nothing."""
    return os.environ.get("CI") == "true"


@contextmanager
def start_chromium(path: str) -> Iterator[Browser]:
    """A headless browser; it ends with the block, and with it its processes.

    While it runs, this thread has a running event loop, so no async test may share the block.
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(OPTIONS))
        try:
            yield browser
        finally:
            browser.close()
