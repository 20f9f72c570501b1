"""Applies `--set a.b=c` to a run: the path and the value pass the same checks as those of a file."""

from __future__ import annotations

import re
from typing import Any

import yaml
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from client.run_file import Reader
from client.run_places import Place, Problem, join
from client.run_schema import find_field, is_map, unknown_field_sentence
from protos.stillhouse.v1.run_pb2 import RunSpec

_PATH = re.compile(r"[^.\[\]=]+(\.[^.\[\]=]+|\[\d+\])*")


class _Refused(Exception):  # noqa: N818 (it never leaves this file)
    """The path of an override does not fit; carries the part that was understood and a sentence."""

    def __init__(self, spelled: str, sentence: str) -> None:
        super().__init__(sentence)
        self.spelled = spelled


def apply_override(override: str, spec: RunSpec, reader: Reader) -> None:
    """Sets the field that `override`, such as "loss.terms.0.weight=2" or "loss.terms[0].weight=2", names.

    Text is taken as it stands; a list or a set of fields is written as YAML, "student.lora={rank: 8}". An index
    equal to the length of a list adds to it. Problems go to `reader`.
    """
    place = Place(source=f"--set {override}")
    reader.override = place
    try:
        path, equals, value = override.partition("=")
        if not equals:
            raise _Refused("", "expects path=value, such as loss.top_k=32.")
        if path.startswith("labels."):
            spec.labels[path.removeprefix("labels.")] = value
            reader.places.note(path, place, path)
            return
        if not _PATH.fullmatch(path):
            raise _Refused("", f'"{path}" is no path; write one such as loss.terms[0].weight.')
        segments = [segment for segment in re.split(r"\.|\[|\]\.?", path) if segment]
        _set(spec, segments, value, reader, place)
    except _Refused as refused:
        reader.problems.append(Problem(place=place, path=refused.spelled, sentence=str(refused)))
    finally:
        reader.override = None


def _set(spec: RunSpec, segments: list[str], text: str, reader: Reader, place: Place) -> None:
    message: Message = spec
    path: list[str] = []
    spelled: list[str] = []
    while segments:
        name = segments.pop(0)
        spelled.append(name)
        field = find_field(message.DESCRIPTOR, name)
        if field is None:
            prefix = join(spelled[:-1])
            raise _Refused(join(spelled), unknown_field_sentence(message.DESCRIPTOR, name, prefix))
        path.append(field.name)
        if not segments:
            _replace(field, message, text, reader, join(path), join(spelled), place)
            return
        if field.is_repeated and not is_map(field):
            items = getattr(message, field.name)
            index = _index(segments.pop(0), items, join(spelled))
            path.append(f"[{index}]")
            spelled.append(f"[{index}]")
            if field.message_type is None:
                _set_item(field, items, index, segments, text, reader, join(path), join(spelled), place)
                return
            element: Message = items[index] if index < len(items) else items.add()
            if not segments:
                _read_yaml(text, reader, place, element, join(path), join(spelled))
                return
            reader.places.note(join(path), place, join(spelled))
            message = element
        elif field.message_type is not None:
            message = getattr(message, field.name)
            message.SetInParent()
        else:
            raise _Refused(join(spelled), f'is one value and has no "{segments[0]}" below it.')


def _index(segment: str, items: Any, spelled: str) -> int:
    if not segment.isdecimal():
        raise _Refused(spelled, f'is a list; write an index for "{segment}", such as {spelled}[0].')
    index = int(segment) if len(segment) < 9 else 10**9
    if index > len(items):
        raise _Refused(spelled, f"has {len(items)} items; index {segment} is beyond its end.")
    return index


def _set_item(
    field: FieldDescriptor,
    items: Any,
    index: int,
    below: list[str],
    text: str,
    reader: Reader,
    path: str,
    spelled: str,
    place: Place,
) -> None:
    if below:
        raise _Refused(spelled, f'is one value and has no "{below[0]}" below it.')
    value = reader.read_scalar(field, yaml.ScalarNode(None, text), spelled, verbatim=True)
    if value is not None:
        items[index : index + 1] = [value]
        reader.places.note(path, place, spelled)


def _replace(
    field: FieldDescriptor, message: Message, text: str, reader: Reader, path: str, spelled: str, place: Place
) -> None:
    reader.places.forget_below(path)
    if field.message_type is None and not field.is_repeated:
        value = reader.read_scalar(field, yaml.ScalarNode(None, text), spelled, verbatim=True)
        if value is not None:
            setattr(message, field.name, value)
            reader.places.note(path, place, spelled)
        return
    node = _composed(text, spelled)
    if node is not None:
        message.ClearField(field.name)
        reader.read_field(field, node, node, message, path, spelled)


def _read_yaml(text: str, reader: Reader, place: Place, element: Message, path: str, spelled: str) -> None:
    node = _composed(text, spelled)
    element.Clear()
    reader.places.forget_below(path)
    reader.places.note(path, place, spelled)
    reader.read_message(node, element, path, spelled)


def _composed(text: str, spelled: str) -> yaml.Node:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        node = None
    if node is None:
        raise _Refused(
            spelled, f'expects a list or a set of fields, such as [a, b] or {{a: 1}}; "{text}" is none.'
        )
    return node
