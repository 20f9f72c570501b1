"""Source locations of a run's fields, so that an error, also one of the service, points at the user's own text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from stillhouse.client.core.errors import LocatedViolation
from stillhouse.client.runfile.fields import snake, spelled_like
from stillhouse.protos.errors import FieldViolation, Reason, StillhouseError

_SEGMENT = re.compile(r"\[(\d+)\]|([^.\[\]]+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceLocation:
    """A position in a run file, or an override on the command line."""

    source: str
    """File name, or the whole "--set a.b=c"; empty for values that were in no file."""
    line: int = 0
    """Counts from 1; 0 for an override."""
    column: int = 0
    """Counts from 1; 0 for an override."""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line and self.source else self.source


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One problem of a run file."""

    location: SourceLocation
    path: str
    """The field, in the file's own spelling; empty for the file as a whole."""
    sentence: str

    def __str__(self) -> str:
        return ": ".join(part for part in (str(self.location), self.path, self.sentence) if part)


@dataclass(kw_only=True, slots=True)
class SourceMap:
    """Field path, such as "loss.terms[0].alpha", in any spelling, to its location and spelling in the file."""

    root: SourceLocation
    camel_case: bool = False
    """True if the file spells its fields in lowerCamelCase."""
    _known: dict[str, tuple[SourceLocation, str]] = field(default_factory=dict)

    def note(self, path: str, location: SourceLocation) -> None:
        """Records the location of `path`, and its spelling."""
        self._known[snake(path)] = location, path

    def forget_below(self, path: str) -> None:
        """Forgets everything under `path`, which an override replaces."""
        above = snake(path)
        for known in [each for each in self._known if each.startswith((f"{above}.", f"{above}["))]:
            del self._known[known]

    def find(self, path: str) -> tuple[SourceLocation, str]:
        """Location and spelling of `path`; if it is not in the file, those of the nearest field around it."""
        segments = [match.group() for match in _SEGMENT.finditer(path)]
        for length in range(len(segments), 0, -1):
            known = self._known.get(snake(_join(segments[:length])))
            if known is not None:
                location, spelled = known
                return location, _join([spelled, *self._spelled(segments[length:])])
        return self.root, _join(self._spelled(segments))

    def located(self, error: StillhouseError) -> StillhouseError:
        """`error` with the service's field violations as problems of the file."""
        if error.reason is not Reason.INVALID_SPEC or not error.violations:
            return error
        return invalid(self.problems_of(error.violations))

    def problems_of(
        self, violations: Sequence[FieldViolation], known: Sequence[Problem] = ()
    ) -> list[Problem]:
        """The service's field violations as problems of the file, without those that follow from `known` problems.

        Such are those of a field that could not be read, and of an absent one in a section that could not.
        """
        unread = [snake(each.path) for each in known]
        sections = {_parent(path) for path in unread}
        problems = []
        for violation in violations:
            path = violation.field.removeprefix("spec.")
            location, spelled = self.find(path)
            is_within = any(path == each or path.startswith((f"{each}.", f"{each}[")) for each in unread)
            is_absent = path not in self._known and _parent(path) in sections
            if not is_within and not is_absent:
                problems.append(Problem(location=location, path=spelled, sentence=violation.description))
        return problems

    def _spelled(self, segments: Sequence[str]) -> list[str]:
        return [spelled_like(each, "aA") if self.camel_case else each for each in segments]


def _parent(path: str) -> str:
    """The path of the section that a field or an item is in."""
    return path[: max(path.rfind("."), path.rfind("["), 0)]


def _join(segments: Sequence[str]) -> str:
    """The path of `segments`, where "[0]" is an index: a.b[0].c."""
    path = ""
    for segment in segments:
        path += segment if not path or segment.startswith("[") else f".{segment}"
    return path


def invalid(problems: Sequence[Problem]) -> StillhouseError:
    """One error with all `problems`: those of the file by position, then those of overrides."""
    ordered = sorted(
        problems, key=lambda each: (not each.location.line, each.location.line, each.location.column)
    )
    return StillhouseError(
        Reason.INVALID_SPEC,
        "\n".join(dict.fromkeys(str(each) for each in ordered)),
        violations=[
            LocatedViolation(
                field=each.path,
                description=each.sentence,
                line=each.location.line if each.location.source else 0,
                column=each.location.column,
            )
            for each in ordered
        ],
    )
