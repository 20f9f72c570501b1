"""Parses the completions of a file: a row for each, with its fields, `parse_ok` and the reason if it is false."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stillhouse.client.core.errors import usage_error
from stillhouse.client.datasets.parsing.fields import Answer, Field, SearchTimeout
from stillhouse.client.datasets.parsing.problem import ParseProblem
from stillhouse.client.datasets.parsing.tags import Tag, sections
from stillhouse.client.datasets.row_files import json_line, no_rows, rows_of, whole_files
from stillhouse.client.datasets.row_text import parts_of
from stillhouse.protos.rows.field_error import FieldError, kind_of, require_text
from stillhouse.protos.rows.reading.row_error import row_error
from stillhouse.protos.rows.row_forms import known_fields

RAW, OK, REASON = "raw_output", "parse_ok", "parse_reason"
MAX_TIMEOUTS = 3
"""Rows whose search was given up after which the pattern is."""
DEFAULT_TAGS = (Tag(name="think", is_required=False), Tag(name="answer"))
_DROPPED = ("completions", "usage")
"""Fields of a batch's row that its samples replace."""

_TAG = re.compile(r"[^<>/\s]{1,100}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParseSettings:
    """Sections and fields to look for."""

    tags: Sequence[Tag] = DEFAULT_TAGS
    """Sections, in the order of the text; none takes the whole text."""
    within: str = "answer"
    """Section that holds the fields; the whole text without tags."""
    fields: Sequence[Field] = ()
    """Fields of that section."""
    text_field: str = ""
    """Field of the rows that holds the text; by default the completion."""


@dataclass(kw_only=True, slots=True)
class ParseSummary:
    """Counts of a parsed file."""

    rows: int = 0
    parsed: int = 0
    """Rows with parse_ok."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Reasons of the others, without their values."""


def parse_file(source: Path, out: Path, settings: ParseSettings) -> ParseSummary:
    """Writes a row for each completion of `source` to `out`.

    Raises StillhouseError for an invalid row, and for a pattern that takes too long; then nothing is written.
    """
    parser = _Parser(settings)
    with whole_files([out], inputs=[source]) as (file,):
        for number, values in rows_of(source):
            try:
                for row in parser.rows(values):
                    file.write(json_line(row))
            except FieldError as error:
                raise row_error(source, number, error.field, error.problem) from error
        if not parser.summary.rows:
            raise no_rows(source)
    return parser.summary


class _Parser:
    def __init__(self, settings: ParseSettings) -> None:
        names = [each.name for each in settings.tags]
        if settings.tags and settings.fields and settings.within not in names:
            raise usage_error(
                f"fields are looked for in <{settings.within}>, which is no tag of {', '.join(names)}. Add it, or name one."
            )
        for name in names:
            if not _TAG.fullmatch(name):
                raise usage_error(
                    f"{name[:80]!r} is no name of a tag; write it without brackets, such as answer for <answer>."
                )
        taken = [RAW, OK, REASON, *names, *(each.name for each in settings.fields)]
        twice = next((name for name, count in Counter(taken).items() if count > 1), None)
        if twice is not None:
            raise usage_error(f"{twice} is the name of two fields. Give each its own.")
        self._settings = settings
        self._names = taken
        self._timeouts = 0
        self.summary = ParseSummary()

    def rows(self, values: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the row of each completion. Raises FieldError."""
        for kept, text in self._texts(values):
            taken = next((name for name in self._names if name in kept and name != RAW), None)
            if taken is not None:
                raise FieldError(taken, "is there already. Rename it, or the field that is parsed.")
            yield {**kept, RAW: text, **self._parse(text)}

    def _texts(self, values: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str | None]]:
        """Yields the other fields and the text of each completion; None for a sample that failed."""
        name = self._settings.text_field or (RAW if RAW in values else "")
        if name:
            yield dict(values), require_text(values.get(name), name)
        elif values.get("completions") is not None:
            yield from _samples(values)
        elif values.get("error") is not None:
            yield dict(values), None
        else:
            parts = parts_of(values)
            if not (parts.completion or _has_completion(values)):
                raise FieldError("completion", "is missing. Give rows with completions, or name their field.")
            yield dict(values), parts.completion

    def _parse(self, text: str | None) -> dict[str, Any]:
        settings = self._settings
        found: dict[str, Any] = dict.fromkeys(self._names[3:])
        reason: str | None = None
        if text is None:
            reason = "the sample failed"
        elif not text.strip():
            reason = "the completion is empty"
        else:
            try:
                found |= sections(text, settings.tags)
                answer = Answer(found[settings.within] or "" if settings.tags and settings.fields else text)
                for each in settings.fields:
                    found[each.name] = each.value(answer)
            except SearchTimeout as problem:
                self._count_timeout(problem)
                reason = str(problem)
            except ParseProblem as problem:
                reason = str(problem)
        self.summary.rows += 1
        self.summary.parsed += reason is None
        if reason is not None:
            self.summary.reasons[_without_values(reason)] += 1
        return {**found, OK: reason is None, REASON: reason}

    def _count_timeout(self, problem: SearchTimeout) -> None:
        self._timeouts += 1
        if self._timeouts > MAX_TIMEOUTS:
            raise usage_error(f"{problem}, in {self._timeouts} rows so far. Simplify the pattern.")


def _has_completion(values: Mapping[str, Any]) -> bool:
    """True for a row whose completion is there, though a teacher may have written nothing."""
    known = known_fields(values)
    turns = known.get("messages")
    is_answered = isinstance(turns, list) and bool(turns) and turns[-1].get("role") == "assistant"
    return is_answered or known.get("completion") is not None


def _samples(values: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str | None]]:
    samples = values["completions"]
    if not isinstance(samples, list):
        raise FieldError("completions", f"is {kind_of(samples)}; it must be a list.")
    kept = {name: value for name, value in values.items() if name not in _DROPPED}
    if not samples:
        yield kept, None
    for index, sample in enumerate(samples):
        if not isinstance(sample, dict) or not isinstance(sample.get("text"), str):
            raise FieldError(
                f"completions[{index}]", "has no text. Give the output of `stillhouse generate`."
            )
        own = {name: value for name, value in sample.items() if name != "text"}
        row = {**kept, **own, **({"sample": index} if len(samples) > 1 else {})}
        if sample.get("error") is not None:
            yield row, None
            continue
        turn = {"role": "assistant", "content": sample["text"]}
        if isinstance(kept.get("messages"), list):
            row["messages"] = [*kept["messages"], turn]
        elif isinstance(kept.get("prompt"), str):
            row["completion"] = sample["text"]
        elif isinstance(kept.get("prompt"), list):
            row["completion"] = [turn]
        yield row, sample["text"]


def _without_values(reason: str) -> str:
    """Returns a reason without quoted values, so that equal ones are counted together."""
    name, colon, rest = reason.partition(": ")
    if not colon:
        return reason.partition(" (")[0]
    return (
        f"{name}: no {rest.rpartition(' is no ')[2]}"
        if " is no " in rest
        else f"{name}: {rest.partition(' (')[0]}"
    )
