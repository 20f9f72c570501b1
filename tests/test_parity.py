"""The parity page and its script have the same rows."""

from __future__ import annotations

import re
from pathlib import Path

from examples.parity import objectives, system0, system4, task_life
from examples.parity.rows import ROWS

MODULES = (objectives, system0, system4, task_life)
"""Each adds its rows."""
PAGE = Path(__file__).parents[1] / "docs" / "parity.md"


def test_the_page_and_the_script_have_the_same_rows() -> None:
    listed = re.findall(r"^\| ([A-Za-z0-9]+) \|", PAGE.read_text(), flags=re.MULTILINE)
    rows = [each for each in listed if each != "Row"]
    assert sorted(rows) == sorted(ROWS)
    numbers = {f"A{number}" for number in range(1, 56)}
    assert numbers <= set(rows), numbers - set(rows)
