"""References `${...}` in a pipeline file: found, checked and replaced in YAML nodes, which keep their lines."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import yaml

REFERENCE = re.compile(r"\$(?:\$|\{([^{}]*)\})")
"""`${name}`; `$$` is a dollar sign."""
NAME = re.compile(r"(?:(?P<stage>[A-Za-z0-9_-]+)(?:\[(?P<key>[^\[\]]+)\])?\.)?(?P<name>[A-Za-z0-9_-]+)")
"""`variable`, `inputs.NAME`, `outputs.NAME`, `STAGE.NAME` or `STAGE[KEY].NAME`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """One reference."""

    stage: str
    """A stage, "inputs", "outputs", or empty for a variable."""
    key: str
    """Value of the stage's `for_each`; empty for that of the stage it stands in, or for all."""
    name: str
    """An input, an output or a variable."""

    def __str__(self) -> str:
        where = f"{self.stage}[{self.key}]." if self.key else f"{self.stage}." if self.stage else ""
        return f"${{{where}{self.name}}}"


def parse_reference(text: str) -> Reference | None:
    """The reference in `text`, the part between the braces; None if it is none."""
    match = NAME.fullmatch(text.strip())
    if match is None:
        return None
    return Reference(stage=match["stage"] or "", key=match["key"] or "", name=match["name"])


def scalars(node: yaml.Node) -> Iterator[yaml.ScalarNode]:
    """Every scalar below `node`, keys as well."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from scalars(item)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from scalars(key)
            yield from scalars(value)


def references_in(text: str) -> Iterator[tuple[str, Reference | None]]:
    """Every `${...}` of `text` as it is written, and its reference, None for one that cannot be read."""
    for match in REFERENCE.finditer(text):
        if match[1] is not None:
            yield match[0], parse_reference(match[1])


Resolve = Callable[[Reference], Sequence[str]]
"""The values of a reference: one, or one for each value of another stage's `for_each`."""


def substituted(node: yaml.Node, resolve: Resolve) -> yaml.Node:
    """A copy of `node` with every reference replaced.

    An item of a list, and text that is the value of a field, becomes as many items as its references have values.
    Raises ValueError where one value must stand and there are several.
    """
    return _copied(node, resolve)


def replace_references(text: str, resolve_one: Callable[[Reference], str]) -> str:
    """`text` with every reference replaced by its one value."""

    def replacement(match: re.Match[str]) -> str:
        reference = None if match[1] is None else parse_reference(match[1])
        return "$" if reference is None else resolve_one(reference)

    return REFERENCE.sub(replacement, text)


def _only(reference: Reference, values: Sequence[str]) -> str:
    if len(values) != 1:
        raise ValueError(
            f"{reference} has {len(values)} values here, where one can stand; name one, such as "
            f"${{{reference.stage}[…].{reference.name}}}, or make it an item of a list."
        )
    return values[0]


def _copied(node: yaml.Node, resolve: Resolve) -> yaml.Node:
    copied = copy.copy(node)
    if isinstance(node, yaml.ScalarNode):
        if REFERENCE.search(node.value):
            copied.value = replace_references(node.value, lambda each: _only(each, resolve(each)))
            copied.tag = "tag:yaml.org,2002:str"
    elif isinstance(node, yaml.SequenceNode):
        copied.value = [_copied(item, each) for item in node.value for each in _choices(item, resolve)]
    elif isinstance(node, yaml.MappingNode):
        copied.value = [(_copied(key, resolve), _value(value, resolve)) for key, value in node.value]
    return copied


def _value(node: yaml.Node, resolve: Resolve) -> yaml.Node:
    """The value of a field; text with several values is a list."""
    if isinstance(node, yaml.ScalarNode):
        items = [_copied(node, each) for each in _choices(node, resolve)]
        if len(items) != 1:
            return yaml.SequenceNode("tag:yaml.org,2002:seq", items, node.start_mark, node.end_mark)
    return _copied(node, resolve)


def _choices(node: yaml.Node, resolve: Resolve) -> list[Resolve]:
    """Resolves the references below `node` that have several values to the first of each, to the second, and so on."""
    several: dict[Reference, Sequence[str]] = {}
    for scalar in scalars(node):
        for _, reference in references_in(scalar.value):
            if reference is not None and len(values := resolve(reference)) != 1:
                several[reference] = values
    if not several:
        return [resolve]
    counts = {len(values) for values in several.values()}
    if len(counts) > 1:
        listed = ", ".join(f"{reference} {len(values)}" for reference, values in several.items())
        raise ValueError(f"the references of one item have different numbers of values: {listed}.")
    return [
        partial(_chosen, {each: [values[index]] for each, values in several.items()}, resolve)
        for index in range(counts.pop())
    ]


def _chosen(
    choice: Mapping[Reference, Sequence[str]], resolve: Resolve, reference: Reference
) -> Sequence[str]:
    return choice.get(reference) or resolve(reference)
