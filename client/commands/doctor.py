"""`stillhouse doctor`: checks everything that a run needs, with a remedy for each problem."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from stillhouse.client.terminal.session import Session, command

_PATH = click.Path(path_type=Path)
EXIT_UNWELL = 1
_MARKS = {"ok": "ok  ", "warning": "!   ", "failed": "FAIL"}


@command()
@click.option("--student", type=_PATH, help="Model directory whose tokenizer must be the teacher's.")
@click.option("--data-dir", type=_PATH, help="The trainer's data directory, if this is its host.")
@click.option(
    "--only",
    type=click.Choice(["all", "here", "teacher", "trainer"]),
    default="all",
    show_default=True,
    help="Only these checks.",
)
def doctor(session: Session, *, student: Path | None, data_dir: Path | None, only: str) -> int:
    """Check this machine, the teacher and the trainer, and suggest remedies.

    The exit code is 1 if anything FAILed; items marked ! work, but need attention.
    """
    from stillhouse.client.doctor import checks

    findings = []
    if only in ("all", "here"):
        findings += [*checks.machine(data_dir), *checks.certificates(session.settings)]
    if only in ("all", "teacher"):
        findings += checks.teacher(session.settings, student)
    if only in ("all", "trainer"):
        findings += checks.trainer(session.settings)
    failed = any(each.state == "failed" for each in findings)
    rows = [asdict(each) | {"remedy": each.remedy or None} for each in findings]
    width = max((len(each.check) for each in findings), default=0)
    lines = []
    for each in findings:
        lines.append(f"{_MARKS[each.state]}  {each.check.ljust(width)}  {each.found}")
        if each.remedy:
            lines.append(f"      {' ' * width}  → {each.remedy}")
    session.show({"well": not failed, "findings": rows}, "\n".join(lines))
    return EXIT_UNWELL if failed else 0
