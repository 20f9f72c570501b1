"""Somebody exchanges a folder for a link while files below it are read: nothing outside is ever read."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.student_trainer.runs.api.artifacts import open_below

SECONDS, LEAST = 3.0, 50


@pytest.mark.faults(row=14)
def test_a_link_that_takes_a_folders_place_meanwhile_leads_nowhere(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    for folder, text in ((run / "final", b"inside"), (outside, b"outside")):
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(text)
    (run / "link").symlink_to(outside)
    ended = threading.Event()

    def exchange() -> None:
        while not ended.is_set():
            for taken, put in (("folder", "link"), ("link", "folder")):
                (run / "final").rename(run / taken)
                (run / put).rename(run / "final")

    thread = threading.Thread(target=exchange)
    thread.start()
    seen: Counter[bytes] = Counter()
    deadline = time.monotonic() + SECONDS
    try:
        while time.monotonic() < deadline:
            try:
                with open_below(run, "final/weights") as file:
                    seen[file.read()] += 1
            except StillhouseError as error:
                refused = error.reason is Reason.ARTIFACT_NOT_FOUND
                seen[b"" if refused else error.message.encode()] += 1
    finally:
        ended.set()
        thread.join()
    assert set(seen) == {b"inside", b""}
    assert min(seen.values()) >= LEAST, seen
    record_property(
        "figure", f"read {seen[b'inside']} times, refused {seen[b'']} times while it was exchanged"
    )
