"""Compiled code that is kept follows the sources of all that it calls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

INNER = """
from stillhouse.protos.tensors.compiled_loop import compiled_loop

@compiled_loop
def number(value):
    return value + {added}
"""
OUTER = """
from inner import number
from stillhouse.protos.tensors.compiled_loop import compiled_loop

@compiled_loop
def twice(value):
    return 2 * number(value)

print(twice(1), sum(twice.stats.cache_hits.values()))
"""


def run(directory: Path) -> list[int]:
    """The function's value and the number of its versions that were kept, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "outer.py"], cwd=directory, check=True, capture_output=True, text=True
    )
    return [int(each) for each in done.stdout.split()]


def test_a_change_of_a_called_file_is_seen(tmp_path: Path) -> None:
    (tmp_path / "outer.py").write_text(OUTER)
    (tmp_path / "inner.py").write_text(INNER.format(added=1))
    assert run(tmp_path) == [4, 0]
    assert run(tmp_path) == [4, 1]
    (tmp_path / "inner.py").write_text(INNER.format(added=5))
    assert run(tmp_path) == [12, 0]
    assert run(tmp_path) == [12, 1]
