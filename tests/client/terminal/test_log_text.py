"""A run's log for people: events with their time and fields, anything else as it is, nothing that steers the terminal."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from stillhouse.client.terminal.log_text import LogText

AT = "2026-11-29T19:43:56.045659Z"
CLOCK = datetime.fromisoformat(AT).astimezone().strftime("%H:%M:%S")


def line(event: str, **fields: Any) -> str:
    return json.dumps({"run": "aaaaaaaaaaaa", "event": event, "level": "info", "ts": AT, **fields}) + "\n"


def test_events_are_lines_and_attempts_have_headings() -> None:
    text = LogText()
    assert text.add(line("training", attempt=1, step=3, loss=0.000012345, of=["a"])) == (
        f'Attempt 1\n{CLOCK}  training  step=3  loss=1.234e-05  of=["a"]\n'
    )
    assert text.add(line("slow", attempt=1, level="warning")) == f"{CLOCK}  WARNING  slow\n"
    assert text.add(line("again", attempt=2)).startswith("Attempt 2\n")
    assert text.add(line("bug", attempt=2, exception="Traceback:\n  here\n")) == (
        f"{CLOCK}  bug\nTraceback:\n  here\n"
    )


def test_cut_lines_are_joined_and_foreign_ones_shown() -> None:
    text, written = (
        LogText(),
        line("training", step=1) + "Segmentation fault\x1b[2J\n" + '{"no": "event"}\nrest',
    )
    shown = "".join(text.add(each) for each in written) + text.end()
    assert shown == f'{CLOCK}  training  step=1\nSegmentation fault\\x1b[2J\n{{"no": "event"}}\nrest\n'
    assert text.end() == ""
    assert LogText().add(line("when", ts="never")) == "when\n"
