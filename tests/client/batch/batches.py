"""Files of a batch, the command that runs it, and the completion of a single prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from stillhouse.client.api import Completion, Teacher
from stillhouse.client.cli import cli


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def command(target: str, *arguments: object) -> Result:
    return CliRunner().invoke(cli, ["--teacher", target, "generate", *map(str, arguments)])


def alone(teacher: Teacher, prompt: Any, **options: Any) -> Completion:
    return next(teacher.complete([prompt], **{"seed": 5, "max_new_tokens": 6} | options))
