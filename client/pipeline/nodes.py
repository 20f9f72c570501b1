"""Refuses what no part of a pipeline file may be: of a foreign tag, no text for a name, a name given twice."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

_TAGS = tuple(
    f"tag:yaml.org,2002:{each}"
    for each in ("str", "int", "float", "bool", "null", "timestamp", "map", "seq", "merge", "value")
)


def node_problems(root: yaml.Node) -> Iterator[tuple[yaml.Node, str]]:
    """Yields nodes that are refused, each with the reason; after this every node can be made a value of Python's types.

    The size of the file, aliases in full, was bounded when it was composed. A scalar like 12:30 or 007, which YAML takes for a number that is written otherwise, becomes text; so does a date.
    """
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node.tag not in _TAGS:
            yield node, f"has the tag {node.tag}, which a pipeline does not know; remove it."
        elif isinstance(node, yaml.ScalarNode):
            _keep_as_written(node)
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    yield key, "expects a field name; this is a list or a set of fields."
                    continue
                waiting.append(value)
                if key.tag.endswith(":merge"):
                    continue
                key.tag = _TAGS[0]
                if key.value in names:
                    yield key, f'"{key.value[:80]}" is given twice; keep one.'
                names.add(key.value)


def _keep_as_written(node: yaml.ScalarNode) -> None:
    kind = node.tag.rpartition(":")[2]
    is_odd_number = kind == "int" and not node.value.removeprefix("-").isdecimal()
    is_padded = kind == "int" and len(node.value) > 1 and node.value.removeprefix("-").startswith("0")
    if (
        is_odd_number
        or is_padded
        or kind in ("timestamp", "value")
        or (kind == "float" and ":" in node.value)
    ):
        node.tag = _TAGS[0]
