"""A row as filters see it, and the reason for which one drops it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import regex

from stillhouse.client.datasets.row_text import RowParts, parts_of

# Scripts without spaces count by characters, all others by words.
_WORD = regex.compile(
    r"\p{Han}|\p{Hiragana}|\p{Katakana}|\p{Thai}|[\w--[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]]+", regex.V1
)


@dataclass(frozen=True)
class FilterRow:
    """A row and what several filters need of it, computed once."""

    number: int
    values: Mapping[str, Any]

    @cached_property
    def parts(self) -> RowParts:
        """Its texts. Raises FieldError for a row without any."""
        return parts_of(self.values)

    @cached_property
    def completion_words(self) -> Sequence[str]:
        """Words of the completion, in lower case."""
        return words(self.parts.completion)

    @cached_property
    def words(self) -> Sequence[str]:
        """Words of the text without the system's, in lower case."""
        return words(self.parts.own_text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """The reason for which a row is dropped."""

    filter: str
    """Name of the filter."""
    why: str
    """Value and limit, for people."""


class Filter(Protocol):
    """Decides on rows in their order."""

    def __call__(self, row: FilterRow) -> Drop | None:
        """Returns the reason to drop a row; None keeps it. Raises FieldError if the row lacks what it looks at."""


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case; in scripts without spaces each character is one."""
    found: list[str] = _WORD.findall(text.lower())
    return found


def ngrams(parts: Sequence[str], length: int) -> set[str]:
    """Returns the runs of `length` words; a shorter text is one run."""
    if len(parts) <= length:
        return {" ".join(parts)} if parts else set()
    return {" ".join(parts[at : at + length]) for at in range(len(parts) - length + 1)}
