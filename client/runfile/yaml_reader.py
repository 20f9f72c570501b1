"""Reads the YAML nodes of a run file into the fields of a message; a problem is recorded with its location, and reading continues."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, cast

import yaml
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from stillhouse.client.core.json_output import is_map
from stillhouse.client.runfile.fields import find_field, unknown_field_sentence
from stillhouse.client.runfile.scalars import describe, is_auto, is_null, read_value
from stillhouse.client.runfile.schema import holds_json, word_field
from stillhouse.client.runfile.source_map import Problem, SourceLocation, SourceMap
from stillhouse.protos.stillhouse.v1.run_pb2 import RunSpec

MAX_NODES = 20_000
"""Values and names of a file, with each alias in full."""
_STANDARD_TAG = "tag:yaml.org,2002:"
_MERGE_TAG = _STANDARD_TAG + "merge"


class RunFileReader:
    """Walks YAML nodes along the fields of a message and collects values, locations and problems."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.problems: list[Problem] = []
        self.source_map = SourceMap(root=SourceLocation(source=source, line=1, column=1))
        self.override: SourceLocation | None = None
        """Location of all nodes while an override is read."""

    def compose(
        self, text: str, *, needs: str = "a run needs student, teachers and data"
    ) -> yaml.Node | None:
        """The tree of `text`; None, with a problem, where it is empty, with what it `needs`, or no YAML."""
        location = self.source_map.root
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
            size = _size(root, {})
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            location = self._at(mark.line, mark.column) if mark else location
            sentence = f"this is not valid YAML: {error.problem or error.context}."
        except yaml.reader.ReaderError as error:
            before = text[: error.position].split("\n")
            location = self._at(len(before) - 1, len(before[-1]))
            sentence = "this character must not stand in YAML."
        except RecursionError:
            sentence = "the file is nested too deeply."
        else:
            if size > MAX_NODES:
                sentence = f"it has more than {MAX_NODES:,} values, with each alias in full; such a file is a page of text."
            elif root is not None and not is_null(root):
                return root
            else:
                sentence = f"the file is empty; {needs}."
        self.problems.append(Problem(location=location, path="", sentence=sentence))
        return None

    def location(self, node: yaml.Node) -> SourceLocation:
        """Location of the start of `node`."""
        if self.override is not None:
            return self.override
        return self._at(node.start_mark.line, node.start_mark.column)

    def problem(self, node: yaml.Node, path: str, sentence: str) -> None:
        """Records a problem at `node`."""
        self.problems.append(Problem(location=self.location(node), path=path, sentence=sentence))

    def read_message(self, node: yaml.Node, message: Message, path: str) -> None:
        """Reads the fields in the mapping `node` into `message`, which lies at `path` in the file's own spelling."""
        if not isinstance(node, yaml.MappingNode):
            self.problem(node, path, f"expects fields, each as `name: value`; {describe(node)}.")
            return
        seen: dict[str, yaml.ScalarNode] = {}
        for key, value in self._pairs(node, path):
            name = key.value
            below = f"{path}.{name}" if path else name
            field = find_field(message, name)
            if field is None:
                self.problem(key, below, unknown_field_sentence(message, name, path))
            elif not self._is_conflict(field, key, seen, below):
                seen[field.name] = key
                self.source_map.camel_case |= name != field.name
                self.read_field(field, key, value, message, below)

    def read_field(
        self, field: FieldDescriptor, key: yaml.Node, value: yaml.Node, message: Message, path: str
    ) -> None:
        """Reads `value` into `field` of `message`."""
        is_scalar = field.message_type is None and not field.is_repeated
        self.source_map.note(path, self.location(value if is_scalar else key))
        if not self._has_known_tag(value, path):
            return
        name = path.rpartition(".")[2]
        if is_map(field):
            self._read_map(field, value, message, path)
        elif field.is_repeated:
            self._read_list(field, value, message, path)
        elif field.message_type is not None:
            if is_null(value):
                self.problem(key, path, f"is empty; write `{name}: {{}}` for its defaults, or remove it.")
                return
            child: Message = getattr(message, field.name)
            child.SetInParent()
            self.read_message(value, child, path)
        elif is_auto(field, value):
            message.ClearField(field.name)
        elif not is_null(value):
            scalar = self.read_scalar(field, value, path, verbatim=False)
            if scalar is not None:
                setattr(message, field.name, scalar)

    def read_scalar(self, field: FieldDescriptor, node: yaml.Node, path: str, *, verbatim: bool) -> Any:
        """The value of `node` in the type of `field`; None, with a problem, if it has none."""
        holder = field.containing_type
        if holder is not None and holds_json(holder.name, field.name):
            return self._read_json(node, path, verbatim=verbatim)
        if not isinstance(node, yaml.ScalarNode):
            self.problem(node, path, f"expects one value; {describe(node)}.")
            return None
        try:
            return read_value(field, node, verbatim=verbatim)
        except ValueError as error:
            self.problem(node, path, str(error))
            return None

    def _read_json(self, node: yaml.Node, path: str, *, verbatim: bool) -> str | None:
        """JSON text of a set of fields or a list, which the command line writes as YAML; other text as it stands."""
        if isinstance(node, yaml.ScalarNode) and verbatim:
            with suppress(yaml.YAMLError, RecursionError):
                node = yaml.compose(node.value, Loader=yaml.SafeLoader) or node
        if isinstance(node, yaml.ScalarNode):
            return str(node.value)
        try:
            return json.dumps(
                yaml.SafeLoader("").construct_document(node), ensure_ascii=False, allow_nan=False
            )
        except (yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
            self.problem(
                node,
                path,
                f"cannot be written as JSON ({error}); give numbers, text, lists and sets of fields.",
            )
            return None

    def _read_list(self, field: FieldDescriptor, node: yaml.Node, message: Message, path: str) -> None:
        """A list; one value where several may stand is a list of it alone."""
        word = word_field(message.DESCRIPTOR.name, field.name) if field.message_type is not None else None
        is_value = field.message_type is None or word is not None
        alone = isinstance(node, yaml.ScalarNode) and is_value and not is_null(node)
        if not alone and not isinstance(node, yaml.SequenceNode):
            name = path.rpartition(".")[2]
            remedy = (
                'put "- " before its first field' if isinstance(node, yaml.MappingNode) else "write [...]"
            )
            remedy = f"write `{name}: []` or remove it" if is_null(node) else remedy
            self.problem(node, path, f"expects a list; {describe(node)}: {remedy}.")
            return
        items = getattr(message, field.name)
        for index, item in enumerate([node] if alone else node.value):
            item_path = f"{path}[{index}]"
            self.source_map.note(item_path, self.location(item))
            if not self._has_known_tag(item, item_path):
                continue
            if is_null(item):
                self.problem(item, item_path, "is empty; give it a value or remove it.")
            elif field.message_type is not None:
                self._read_item(item, items.add(), item_path, word)
            else:
                value = self.read_scalar(field, item, item_path, verbatim=False)
                if value is not None:
                    items.append(value)

    def _read_item(self, node: yaml.Node, item: Message, path: str, word: str | None) -> None:
        """A message of a list, or the word that stands for its field `word`."""
        if word is None or not isinstance(node, yaml.ScalarNode):
            self.read_message(node, item, path)
            return
        field = cast("FieldDescriptor", item.DESCRIPTOR.fields_by_name[word])
        value = self.read_scalar(field, node, path, verbatim=False)
        if value is not None:
            setattr(item, word, value)

    def _read_map(self, field: FieldDescriptor, node: yaml.Node, message: Message, path: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            self.problem(node, path, f"expects `name: text` pairs; {describe(node)}.")
            return
        value_field = RunSpec.LabelsEntry.DESCRIPTOR.fields_by_name["value"]
        seen = set()
        for key, value in self._pairs(node, path):
            item_path = f"{path}.{key.value}"
            self.source_map.note(item_path, self.location(value))
            if key.value in seen:
                self.problem(key, item_path, "is given twice; keep one.")
            seen.add(key.value)
            text = self.read_scalar(value_field, value, item_path, verbatim=False)
            if text is not None:
                getattr(message, field.name)[key.value] = text

    def _pairs(self, node: yaml.MappingNode, path: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        """Keys and values of `node`; those merged in by `<<` come last and yield to its own."""
        merged: list[tuple[yaml.ScalarNode, yaml.Node]] = []
        own = set()
        for key, value in node.value:
            if key.tag == _MERGE_TAG:
                merged += self._merged(value, path)
            elif isinstance(key, yaml.ScalarNode):
                own.add(key.value)
                yield key, value
            else:
                self.problem(key, path, "expects a field name; this is a list or a set of fields.")
        for key, value in merged:
            if key.value not in own:
                own.add(key.value)
                yield key, value

    def _merged(self, node: yaml.Node, path: str) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        pairs: list[tuple[yaml.ScalarNode, yaml.Node]] = []
        for part in parts:
            if isinstance(part, yaml.MappingNode) and all(key.tag != _MERGE_TAG for key, _ in part.value):
                pairs += self._pairs(part, path)
            else:
                self.problem(part, path, "`<<` expects one set of fields, or a list of them, without `<<`.")
        return pairs

    def _is_conflict(
        self, field: FieldDescriptor, key: yaml.Node, seen: dict[str, yaml.ScalarNode], path: str
    ) -> bool:
        oneof = field.containing_oneof.fields if field.containing_oneof else ()
        rivals = [seen[each.name] for each in oneof if each.name in seen]
        if field.name in seen:
            sentence = f"is given twice, first in line {seen[field.name].start_mark.line + 1}; keep one."
        elif rivals:
            sentence = f'excludes "{rivals[0].value}" beside it; keep one.'
        else:
            return False
        self.problem(key, path, sentence)
        return True

    def _has_known_tag(self, node: yaml.Node, path: str) -> bool:
        if node.tag.startswith(_STANDARD_TAG) and not node.tag.startswith(_STANDARD_TAG + "python"):
            return True
        self.problem(node, path, f"has the tag {node.tag}, which a run file does not know; remove it.")
        return False

    def _at(self, line: int, column: int) -> SourceLocation:
        return SourceLocation(source=self.source, line=line + 1, column=column + 1)


def _size(node: yaml.Node | None, known: dict[int, float]) -> float:
    """Number of nodes below `node`, itself included and aliases in full; infinite if it holds itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = math.inf  # until it is known
        below = (
            itertools.chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        )
        known[id(node)] = 1 + sum(_size(each, known) for each in below)
    return known[id(node)]
