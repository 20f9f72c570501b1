"""Applies `--set a.b=c` to a run: the path and the value pass the same checks as those of a file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from stillhouse.client.core.json_output import is_map
from stillhouse.client.runfile.fields import find_field, unknown_field_sentence
from stillhouse.client.runfile.scalars import is_auto
from stillhouse.client.runfile.source_map import Problem, SourceLocation
from stillhouse.client.runfile.yaml_reader import RunFileReader
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec

_PATH = re.compile(r"[^.\[\]=]+(\.[^.\[\]=]+|\[\d+\])*")
_LABELS = "labels."


class _Refused(Exception):  # noqa: N818 (it never leaves this file)
    """The override does not fit; its text is a sentence."""


def apply_override(override: str, spec: RunSpec, reader: RunFileReader) -> None:
    """Sets the field that `override`, such as "loss.terms.0.weight=2" or "loss.terms[0].weight=2", names.

    Text is taken as it stands; a list or a set of fields is written as YAML, "student.lora={rank: 8}". An index
    equal to the length of a list adds to it. Problems go to `reader`.
    """
    path, equals, text = override.partition("=")
    location = SourceLocation(source=f"--set {override}")
    setting = _Setting(reader=reader, location=location, text=text)
    reader.override = location
    try:
        if path.startswith(_LABELS) and equals:
            spec.labels[path.removeprefix(_LABELS)] = text
            reader.source_map.note(path, location)
        else:
            setting.apply(spec, _segments(path if equals else ""))
    except _Refused as refused:
        reader.problems.append(Problem(location=location, path=setting.path, sentence=str(refused)))
    finally:
        reader.override = None


def _segments(path: str) -> list[str]:
    if not _PATH.fullmatch(path):
        raise _Refused("expects path=value, such as loss.top_k=32 or loss.terms[0].weight=2.")
    return [segment for segment in re.split(r"\.|\[|\]\.?", path) if segment]


@dataclass(kw_only=True, slots=True)
class _Setting:
    """One override on its way down the fields."""

    reader: RunFileReader
    location: SourceLocation
    text: str
    path: str = ""
    """The fields so far, as the override spells them."""

    def apply(self, message: Message, segments: list[str]) -> None:
        """Goes from `message` down `segments`, and sets what is there."""
        while segments:
            name = segments.pop(0)
            above, self.path = self.path, f"{self.path}.{name}" if self.path else name
            found = find_field(message, name)
            if found is None:
                raise _Refused(unknown_field_sentence(message, name, above))
            if not segments:
                self._set_field(found, message)
                return
            if found.is_repeated and not is_map(found):
                items = getattr(message, found.name)
                index = self._index(segments.pop(0), len(items))
                if found.message_type is None:
                    self._set_item(found, items, index, segments)
                    return
                message = items[index] if index < len(items) else items.add()
                if not segments:
                    self._set_element(message)
                    return
                self._note()
            elif is_map(found):
                key = ".".join(segments)
                self.path += f".{key}"
                getattr(message, found.name)[key] = self.text
                self._note()
                return
            elif found.message_type is not None:
                message = getattr(message, found.name)
                message.SetInParent()
            else:
                raise _Refused(f'is one value and has no "{segments[0]}" below it.')

    def _index(self, segment: str, length: int) -> int:
        if not segment.isdecimal():
            raise _Refused(f'is a list; write an index before "{segment}", such as {self.path}[0].')
        index = int(segment[:9])
        if index > length or len(segment) > 9:
            raise _Refused(f"has {length} items; index {segment} is beyond its end.")
        self.path += f"[{index}]"
        return index

    def _set_field(self, found: FieldDescriptor, message: Message) -> None:
        self.reader.source_map.forget_below(self.path)
        if is_auto(found, yaml.ScalarNode("", self.text)):
            self._note()
            message.ClearField(found.name)
            return
        if found.message_type is None and not found.is_repeated:
            value = self._scalar(found)
            if value is not None:
                setattr(message, found.name, value)
            return
        node = self._composed()
        message.ClearField(found.name)
        self.reader.read_field(found, node, node, message, self.path)

    def _set_item(self, found: FieldDescriptor, items: Any, index: int, below: list[str]) -> None:
        if below:
            raise _Refused(f'is one value and has no "{below[0]}" below it.')
        value = self._scalar(found)
        if value is not None:
            items[index : index + 1] = [value]

    def _set_element(self, element: Message) -> None:
        node = self._composed()
        element.Clear()
        self.reader.source_map.forget_below(self.path)
        self._note()
        self.reader.read_message(node, element, self.path)

    def _scalar(self, found: FieldDescriptor) -> Any:
        value = self.reader.read_scalar(found, yaml.ScalarNode("", self.text), self.path, verbatim=True)
        if value is not None:
            self._note()
        return value

    def _composed(self) -> yaml.Node:
        try:
            node = yaml.compose(self.text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError):
            node = None
        if node is None:
            raise _Refused(
                f'expects a list or a set of fields, such as [a, b] or {{a: 1}}; "{self.text}" is none.'
            )
        return node

    def _note(self) -> None:
        self.reader.source_map.note(self.path, self.location)
