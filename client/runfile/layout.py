"""Places of values in the text of a YAML document: writes and removes one without a touch on the lines of others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from stillhouse.client.runfile.yaml_text import Plain, flow_text, lines_of, literal_text

INDENT = 2
Step = str | int


class NoPlace(Exception):  # noqa: N818 (it never leaves the room)
    """The layout of the text leaves no place for the change."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """A node, and the collection that it lies in."""

    node: yaml.Node
    column: int
    """Column of the keys, or the dashes, of the block that it lies in; -INDENT for the document."""
    colon: int | None
    """Index behind the colon of its key; None for an item of a list and for the document."""
    in_flow: bool
    """True within brackets or braces."""


class Layout:
    """The text of a document and its nodes."""

    def __init__(self, text: str, root: yaml.Node) -> None:
        self._text, self._root = text, root

    def written(self, steps: Sequence[Step], item: Any) -> str:
        """The text with `item` at the place of `steps`. Raises NoPlace."""
        place = self._document()
        for at, step in enumerate(steps):
            below = self._below(place, step)
            if below is None:
                return self._added(place, steps[at:], item)
            place = below
        return self._replaced(place, item)

    def removed(self, steps: Sequence[Step], is_pruned: Callable[[yaml.Node, int, Step], bool]) -> str:
        """The text without what is at the place of `steps`, and without collections that are then empty and pruned.

        `is_pruned` is told the collection, its depth and the step that leads to it. Raises NoPlace.
        """
        places = [self._document()]
        for step in steps:
            below = self._below(places[-1], step)
            if below is None:
                return self._text
            places.append(below)
        while len(_children(places[-2].node)) == 1:
            if len(places) == 2 or not is_pruned(places[-2].node, len(places) - 2, steps[len(places) - 3]):
                return self._replaced(places[-2], {} if isinstance(places[-2].node, yaml.MappingNode) else [])
            places.pop()
        return self._without(places[-2], places[-1])

    def _document(self) -> _Place:
        return _Place(node=self._root, column=-INDENT, colon=None, in_flow=False)

    def _below(self, place: _Place, step: Step) -> _Place | None:
        """The place one step down; None if there is nothing."""
        node = place.node
        if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            if step >= len(node.value):
                return None
            found, start, colon = node.value[step], node.start_mark.index, None
        elif isinstance(node, yaml.MappingNode) and isinstance(step, str):
            pair = next((each for each in node.value if spells(each[0].value, step)), None)
            if pair is None:
                return None
            found, start = pair[1], pair[0].end_mark.index
            colon = self._text.index(":", start) + 1
        else:
            return None
        if found.start_mark.index < start:
            raise NoPlace  # an alias, whose node lies elsewhere
        in_flow = place.in_flow or _is_flow(node)
        return _Place(node=found, column=node.start_mark.column, colon=colon, in_flow=in_flow)

    def _added(self, place: _Place, steps: Sequence[Step], item: Any) -> str:
        node = place.node
        value = _nested(steps[1:], item)
        if isinstance(node, yaml.ScalarNode):
            return self._replaced(place, _nested(steps, item))
        is_list = isinstance(node, yaml.SequenceNode)
        if is_list is not isinstance(steps[0], int) or (is_list and steps[0] != len(node.value)):
            raise NoPlace
        if not node.value and not place.in_flow and (place.colon is not None or place.column >= 0):
            return self._replaced(place, [value] if is_list else {steps[0]: value})
        if place.in_flow or _is_flow(node):
            text = flow_text(value) if is_list else f"{steps[0]}: {flow_text(value)}"
            close = node.end_mark.index - 1
            start = len(self._text[:close].rstrip())
            return self._spliced(start, start, f", {text}" if node.value else text)
        lines = lines_of([value] if is_list else {steps[0]: value}, node.start_mark.column)
        end = self._line_end(self._end(node))
        return self._spliced(end, end, "\n" + lines)

    def _replaced(self, place: _Place, item: Any) -> str:
        node = place.node
        is_block = isinstance(node, yaml.CollectionNode) and not _is_flow(node)
        start, end = node.start_mark.index, self._end(node)
        if place.in_flow:
            return self._spliced(start, end, flow_text(item))
        if isinstance(item, dict) and item:
            if place.colon is None and place.column < 0:
                raise NoPlace
            column = place.column + INDENT
            lines = lines_of(item, column)
            if place.colon is None:  # behind a dash
                return self._spliced(start, end, lines.lstrip())
            return self._spliced(place.colon, end, "\n" + lines)
        if isinstance(item, list) and any(isinstance(each, list | dict) for each in item):
            if place.colon is None:
                raise NoPlace
            return self._spliced(place.colon, end, "\n" + lines_of(item, place.column + INDENT))
        if isinstance(item, str) and "\n" in item and not isinstance(item, Plain):
            text = literal_text(item, place.column + INDENT) or json.dumps(item, ensure_ascii=False)
        else:
            text = flow_text(item)
        if place.colon is None:
            return self._spliced(start, end, text)
        if is_block or start == end:
            return self._spliced(place.colon, end, f" {text}")
        return self._spliced(start, end, text)

    def _without(self, holder: _Place, place: _Place) -> str:
        children = _children(holder.node)
        number = next(at for at, each in enumerate(children) if each[1] is place.node)
        start, end = children[number][0].start_mark.index, self._end(place.node)
        if holder.in_flow or _is_flow(holder.node):
            if number + 1 < len(children):
                return self._spliced(start, children[number + 1][0].start_mark.index, "")
            return self._spliced(self._end(children[number - 1][1]), end, "")
        if isinstance(holder.node, yaml.SequenceNode):
            start = self._text.rfind("-", 0, start)
        line = self._text.rfind("\n", 0, start) + 1
        if self._text[line:start].strip():
            if number or isinstance(holder.node, yaml.SequenceNode):
                raise NoPlace
            return self._spliced(start, children[1][0].start_mark.index, "")  # the first field behind a dash
        return self._spliced(line, min(len(self._text), self._line_end(end) + 1), "")

    def _end(self, node: yaml.Node) -> int:
        """Index behind the last character of a node; block collections go on to the next token, over comments."""
        if isinstance(node, yaml.CollectionNode) and not _is_flow(node) and node.value:
            key, value = _children(node)[-1]
            if value.start_mark.index < key.start_mark.index:
                raise NoPlace
            return max(key.end_mark.index, self._end(value)) if value is not key else self._end(value)
        start, end = node.start_mark.index, node.end_mark.index
        return start + len(self._text[start:end].rstrip())

    def _line_end(self, index: int) -> int:
        found = self._text.find("\n", index)
        return len(self._text) if found < 0 else found

    def _spliced(self, start: int, end: int, text: str) -> str:
        return self._text[:start] + text + self._text[end:]


def spells(key: object, name: str) -> bool:
    """True if a file's key is the field `name`, in snake_case or lowerCamelCase."""
    head, *rest = name.split("_")
    return key in (name, head + "".join(part.capitalize() for part in rest))


def _is_flow(node: yaml.Node) -> bool:
    """True for a collection in brackets or braces."""
    return isinstance(node, yaml.CollectionNode) and bool(node.flow_style)


def _children(node: yaml.Node) -> list[tuple[yaml.Node, yaml.Node]]:
    """First and last node of each part: key and value, or the item twice."""
    if isinstance(node, yaml.MappingNode):
        return list(node.value)
    return [(each, each) for each in node.value]


def _nested(steps: Sequence[Step], item: Any) -> Any:
    """`item` below `steps`, whose indices are those of new lists."""
    for step in reversed(steps):
        if isinstance(step, int):
            if step:
                raise NoPlace
            item = [item]
        else:
            item = {step: item}
    return item
