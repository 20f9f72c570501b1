"""Checks a commit's message, as a commit-msg hook: a subject of at most 72 characters, an empty line, then the body."""

from __future__ import annotations

import sys
from pathlib import Path

MAX_SUBJECT_CHARS = 72
# Git writes these subjects itself.
WRITTEN_BY_GIT = ("Merge ", "Revert ", "fixup! ", "squash! ", "amend! ")


def main() -> int:
    """Reads the file that git names, and returns the exit status."""
    found = problems(Path(sys.argv[1]).read_text(encoding="utf-8"))
    sys.stderr.writelines(f"commit message: {problem}\n" for problem in found)
    return bool(found)


def problems(message: str) -> list[str]:
    """One sentence for each rule that a message breaks."""
    lines = [line for line in message.splitlines() if not line.startswith("#")]
    subject = lines[0] if lines else ""
    if subject.startswith(WRITTEN_BY_GIT):
        return []
    found = []
    if not subject.strip():
        found.append("the first line is empty; say there what the commit does")
    if len(subject) > MAX_SUBJECT_CHARS:
        found.append(
            f"the subject has {len(subject)} characters, the limit is {MAX_SUBJECT_CHARS}; move the why to the body"
        )
    if subject.endswith("."):
        found.append("the subject ends with a full stop; leave it out")
    if len(lines) > 1 and lines[1].strip():
        found.append("the second line is not empty; leave one between subject and body")
    return found


if __name__ == "__main__":
    sys.exit(main())
