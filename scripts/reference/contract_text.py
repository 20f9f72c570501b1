"""Reads names and comments out of the text of the .proto files: descriptors at run time have no comments."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DIRECTORY = Path(__file__).resolve().parents[2] / "protos" / "stillhouse" / "v1"

_BLOCK = re.compile(r"(?P<kind>message|enum|service|oneof) (?P<name>\w+)")
_LEAVES = (
    re.compile(r"rpc (?P<name>\w+)"),
    re.compile(r"(?:optional |repeated )?(?:map<[\w, .]+>|[\w.]+) (?P<name>\w+) = \d+;"),
    re.compile(r"(?P<name>[A-Z][A-Z0-9_]*) = \d+;"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Declaration:
    """A message, enum, service, rpc, oneof, field or enum value in the text of a .proto file."""

    line: str
    """File and line, such as "run.proto:12"."""
    path: str
    """Name within the package, such as "RunSpec.task"; a oneof adds nothing to the path of its fields."""
    name: str
    comment: str


def declarations() -> Iterator[Declaration]:
    """Every declaration in the .proto files, with the comment before it."""
    for file in sorted(DIRECTORY.glob("*.proto")):
        comment: list[str] = []
        scopes: list[str] = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            text = line.strip()
            if text.startswith("//"):
                comment.append(text.lstrip("/ "))
                continue
            block = _BLOCK.match(text)
            found = block or next((match for leaf in _LEAVES if (match := leaf.match(text))), None)
            if found:
                yield Declaration(
                    line=f"{file.name}:{number}",
                    path=".".join([*filter(None, scopes), found["name"]]),
                    name=found["name"],
                    comment=" ".join(comment).strip(),
                )
            if block and not text.endswith("}"):
                scopes.append("" if block["kind"] == "oneof" else block["name"])
            elif text == "}":
                scopes.pop()
            comment = []


def comments() -> dict[str, str]:
    """Comment of every declaration, by its path."""
    return {each.path: each.comment for each in declarations()}
