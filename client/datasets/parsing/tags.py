"""Sections of a completion between tags such as <think> and </think>; a section that is not clear is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stillhouse.client.datasets.parsing.problem import ParseProblem


@dataclass(frozen=True, kw_only=True, slots=True)
class Tag:
    """A section to look for."""

    name: str
    is_required: bool = True
    """A completion without it is not parsed."""


def sections(text: str, tags: Sequence[Tag]) -> Mapping[str, str | None]:
    """Returns the text of each section, stripped, or None for one that is missing; each is looked for behind the one before.

    The first may begin with the text, for models whose template has opened it. Raises ParseProblem for a required section
    that is missing, and for one that is not closed, or is there several times.
    """
    found: dict[str, str | None] = {}
    rest = text
    for index, tag in enumerate(tags):
        section, rest = _section(rest, tag.name, may_be_open=index == 0)
        if section is None and tag.is_required:
            raise ParseProblem(f"<{tag.name}> is missing")
        found[tag.name] = section
    return found


def _section(text: str, name: str, *, may_be_open: bool) -> tuple[str | None, str]:
    """Returns a section and the text behind it."""
    opening, closing = f"<{name}>", f"</{name}>"
    begin, end = text.find(opening), text.find(closing)
    if begin < 0 and end < 0:
        return None, text
    if begin < 0 or 0 <= end < begin:
        if not may_be_open:
            raise ParseProblem(f"{closing} comes before {opening}")
        begin, inner = 0, 0
    else:
        inner = begin + len(opening)
        end = text.find(closing, inner)
    if end < 0:
        raise ParseProblem(f"<{name}> is not closed")
    section, rest = text[inner:end], text[end + len(closing) :]
    if opening in section or opening in rest or closing in rest:
        raise ParseProblem(f"<{name}> is there several times")
    return section.strip(), rest
