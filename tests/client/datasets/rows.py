"""Files of rows for tests, and the command line on them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from stillhouse.client.cli import cli


def write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    """Reads JSONL."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def data(*arguments: object) -> Result:
    """Runs `stillhouse data ...`."""
    return CliRunner().invoke(cli, ["data", *map(str, arguments)])
