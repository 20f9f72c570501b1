"""Checks a run's values against the schema's ranges and choices, for commands that ask no service; in the service's words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf.message import Message

from stillhouse.client.core.json_output import is_map
from stillhouse.client.runfile.load import RunFile
from stillhouse.client.runfile.schema import rules
from stillhouse.client.runfile.source_map import invalid
from stillhouse.protos.errors import FieldViolation


def check_values(file: RunFile) -> None:
    """Returns if every value that `file` gives is one that its field may have. Raises StillhouseError(INVALID_SPEC)."""
    problems = file.source_map.problems_of(list(_violations(file.spec, "")))
    if problems:
        raise invalid(problems)


def _violations(message: Message, above: str) -> Iterator[FieldViolation]:
    for field, value in message.ListFields():
        path = f"{above}.{field.name}" if above else field.name
        if is_map(field):
            continue
        for index, item in enumerate(value if field.is_repeated else [value]):
            here = f"{path}[{index}]" if field.is_repeated else path
            if field.message_type is not None:
                yield from _violations(item, here)
            elif problem := _problem(item, rules(message.DESCRIPTOR.name, field.name)):
                yield FieldViolation(here, problem)


def _problem(value: Any, rule: Mapping[str, Any]) -> str:
    choices = [each for each in rule.get("enum", ()) if each is not None]
    if choices and value not in choices:
        return f'"{value}" is not known. Possible: {", ".join(choices)}.'
    if isinstance(value, str):
        longest = rule.get("maxLength", len(value))
        return (
            f"has {len(value)} characters; at most {longest} are kept. Shorten it."
            if len(value) > longest
            else ""
        )
    above, below = rule.get("exclusiveMinimum"), rule.get("exclusiveMaximum")
    low, high = rule.get("minimum", above), rule.get("maximum", below)
    is_low = low is not None and (value < low or value == above)
    is_high = high is not None and (value > high or value == below)
    if not (is_low or is_high):
        return ""
    if high is None:
        return f"{value} is out of range; it must be {'above' if above is not None else 'at least'} {low:g}."
    opening, closing = "[" if above is None else "(", "]" if below is None else ")"
    return f"{value} is out of range; it must be in {opening}{low:g}, {high:g}{closing}."
