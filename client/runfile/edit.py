"""Edits a run file's YAML in place: one value is set or removed, and every comment and line of the rest stays.

Text that cannot be edited so, such as a value behind an alias, is written anew from its values, without comments.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import yaml
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from stillhouse.client.core.json_output import is_map
from stillhouse.client.runfile.layout import Layout, NoPlace, spells
from stillhouse.client.runfile.source_map import Problem, SourceLocation, invalid
from stillhouse.client.runfile.yaml_reader import RunFileReader
from stillhouse.client.runfile.yaml_text import Plain, document_text
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec

Value = str | list[str] | dict[str, str] | None
"""Text of a value as it is typed, texts of a list, a set of fields with texts, or None to remove it."""
_SEGMENT = re.compile(r"([^.\[\]]+)|\[(\d{1,5})\]")
_PATH = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[\d{1,5}\])*")
_PLAIN = re.compile(r"[A-Za-z0-9+-][A-Za-z0-9_.+-]*")


def edited(text: str, path: str, value: Value) -> tuple[str, bool]:
    """`text` with `value` at `path`, such as "loss.terms[0].weight", and whether its comments are kept.

    An index equal to the length of a list adds to it. A section that becomes empty is removed where it says nothing by being
    there. Raises StillhouseError(INVALID_SPEC) for text that is no YAML, and for a path that no run has.
    """
    steps = _steps(path)
    field = _field_of(steps, path)
    root = _composed(text)
    document = _document(root)
    item = _rendered(value, field) if value is not None else None
    wanted = copy.deepcopy(document)
    _change(wanted, steps, item)
    written = document_text(wanted)
    if root is None:  # comments at most
        return (text.rstrip() + "\n" if text.strip() else "") + written, True
    changed = _in_place(text, root, steps, item)
    if changed is not None and _reads_as(changed, wanted):
        return changed, True
    return written, "#" not in text


def _in_place(text: str, root: yaml.Node, steps: Sequence[str | int], item: Any) -> str | None:
    layout = Layout(text, root)
    try:
        if item is not None:
            return layout.written(steps, item)
        return layout.removed(
            steps, lambda node, depth, step: _is_pruned(isinstance(node, yaml.SequenceNode), depth, step)
        )
    except NoPlace:
        return None


def _steps(path: str) -> list[str | int]:
    if len(path) > 1000 or not _PATH.fullmatch(path):
        raise _refused(path, "it is no path of a field, such as loss.terms[0].weight.")
    return [int(index) if index else name for name, index in _SEGMENT.findall(path)]


def _field_of(steps: Sequence[str | int], path: str) -> FieldDescriptor:
    """The field at the end of a path, which is spelled in snake_case."""
    message: Descriptor | None = RunSpec.DESCRIPTOR
    field: FieldDescriptor | None = None
    for step in steps:
        if isinstance(step, int):
            if field is None or not field.is_repeated or is_map(field):
                raise _refused(path, "it has an index behind what is no list.")
            continue
        if message is None or step not in message.fields_by_name:
            raise _refused(path, f'a run has no field "{step[:80]}" there.')
        field = message.fields_by_name[step]
        message = None if is_map(field) else field.message_type
    assert field is not None
    return field


def _refused(path: str, sentence: str) -> Exception:
    return invalid([Problem(location=SourceLocation(source=""), path=path[:200], sentence=sentence)])


def _composed(text: str) -> yaml.Node | None:
    reader = RunFileReader("run.yaml")
    if not _has_content(text):
        return None
    root = reader.compose(text)
    if root is None:
        raise invalid(reader.problems)
    if not isinstance(root, yaml.MappingNode):
        raise _refused("", "the file has no fields, each as `name: value`.")
    return root


def _has_content(text: str) -> bool:
    return any(line.strip() and not line.lstrip().startswith("#") for line in text.split("\n"))


def _document(root: yaml.Node | None) -> dict[str, Any]:
    """The values of a file, each alias a copy, with the names of fields as they are written."""
    if root is None:
        return {}
    try:
        found = yaml.SafeLoader("").construct_document(root)
    except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        raise _refused("", f"the file cannot be read ({error}).") from error
    result: dict[str, Any] = _apart(found)
    return result


def _apart(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _apart(item) for key, item in value.items()}
    return [_apart(each) for each in value] if isinstance(value, list) else value


def _rendered(value: Value, field: FieldDescriptor) -> Any:
    """The value that is to stand in the file: text in the type of the field, if it has that."""
    is_text = field.cpp_type in (FieldDescriptor.CPPTYPE_STRING, FieldDescriptor.CPPTYPE_MESSAGE)
    if isinstance(value, list) and not is_text:
        return [yaml.safe_load(each) if _PLAIN.fullmatch(each) else each for each in value]
    if not isinstance(value, str) or is_text or not _PLAIN.fullmatch(value):
        return value
    return Plain(value)


def _change(document: dict[str, Any], steps: Sequence[str | int], item: Any) -> None:
    """Sets or removes the value in plain objects."""
    holders: list[tuple[Any, str | int]] = []
    place: Any = document
    for at, step in enumerate(steps):
        key = _key_in(place, step)
        holders.append((place, key))
        if at == len(steps) - 1:
            break
        is_list = isinstance(steps[at + 1], int)
        below = _get(place, key)
        if not isinstance(below, list if is_list else dict):
            if item is None:
                return
            below = [] if is_list else {}
            _put(place, key, below)
        place = below
    if item is not None:
        _put(*holders[-1], yaml.safe_load(item) if isinstance(item, Plain) else item)
        return
    _remove(*holders[-1])
    while len(holders) > 1 and not holders[-1][0]:
        if not _is_pruned(isinstance(holders[-1][0], list), len(holders) - 1, holders[-2][1]):
            return
        holders.pop()
        _remove(*holders[-1])


def _is_pruned(is_list: bool, depth: int, name: str | int) -> bool:
    """True if a collection that has become empty goes, too: a list, and a section of the file."""
    return is_list or (depth == 1 and not isinstance(name, int))


def _key_in(place: Any, step: str | int) -> Any:
    """The key of a step in a mapping, as the file spells it."""
    if isinstance(step, int) or not isinstance(place, dict):
        return step
    return next((each for each in place if spells(each, step)), step)


def _get(place: Any, key: str | int) -> Any:
    if isinstance(place, list):
        return place[key] if isinstance(key, int) and key < len(place) else None
    return place.get(key)


def _put(place: Any, key: str | int, item: Any) -> None:
    if not isinstance(place, list) or (isinstance(key, int) and key < len(place)):
        place[key] = item
    elif key == len(place):
        place.append(item)
    else:
        raise _refused("", f"the list has {len(place)} items; index {key} is beyond its end.")


def _remove(place: Any, key: str | int) -> None:
    if isinstance(place, list):
        if isinstance(key, int) and key < len(place):
            del place[key]
    else:
        place.pop(key, None)


def _reads_as(text: str, wanted: dict[str, Any]) -> bool:
    try:
        return bool(_document(yaml.compose(text, Loader=yaml.SafeLoader)) == wanted)
    except (yaml.YAMLError, RecursionError):
        return False
