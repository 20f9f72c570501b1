"""Values as YAML text in the style of hand-written run files."""

from __future__ import annotations

import json
from typing import Any

import yaml

WIDTH = 100


class Plain(str):
    """Text that stands in the file without quotes, such as 1e-4 and true."""

    __slots__ = ()


def flow_text(item: Any) -> str:
    """`item` in one line, as it may also stand within brackets."""
    if isinstance(item, Plain):
        return str(item)
    if isinstance(item, str):
        if "\n" in item:
            return json.dumps(item, ensure_ascii=False)
        return _dumped([item], flow=True)[1:-1]
    return _dumped(item, flow=True)


def lines_of(item: Any, column: int) -> str:
    """A set of fields or a list in lines of its own, indented by `column`; without a line break at the end."""
    pad = " " * column
    lines = _dumped(item, flow=False).split("\n")
    return "\n".join(pad + line if line else line for line in lines)


def literal_text(text: str, column: int) -> str | None:
    """`text`, which has line breaks, as a literal block; None if it cannot be one."""
    if any(line != line.rstrip() or line[:1] in (" ", "\t") for line in text.split("\n")) or not text.strip():
        return None
    if not all(each.isprintable() or each == "\n" for each in text):
        return None
    kept = text.rstrip("\n")
    chomp = {0: "-", 1: ""}.get(len(text) - len(kept))
    if chomp is None:
        return None
    pad = " " * column
    return f"|{chomp}\n" + "\n".join(pad + line if line else line for line in kept.split("\n"))


def document_text(item: dict[str, Any]) -> str:
    """A whole file; empty without any field."""
    return _dumped(item, flow=False) + "\n" if item else ""


class _Dumper(yaml.SafeDumper):
    """Indents lists below their keys."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        super().increase_indent(flow, False)


def _list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    is_flat = not any(isinstance(each, list | dict) for each in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=is_flat)


def _dict(dumper: yaml.SafeDumper, value: dict[str, Any]) -> yaml.Node:
    return dumper.represent_mapping("tag:yaml.org,2002:map", value, flow_style=not value)


def _plain(dumper: yaml.SafeDumper, value: Plain) -> yaml.Node:
    return dumper.represent_data(yaml.safe_load(value))


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(list, _list)
_Dumper.add_representer(str, _text)
_Dumper.add_representer(dict, _dict)
_Dumper.add_representer(Plain, _plain)


class _FlowDumper(yaml.SafeDumper):
    """Writes everything within brackets."""


_FlowDumper.add_representer(Plain, _plain)


def _dumped(item: Any, *, flow: bool) -> str:
    text: str = yaml.dump(
        item,
        Dumper=_FlowDumper if flow else _Dumper,
        default_flow_style=flow,
        sort_keys=False,
        allow_unicode=True,
        width=10**9 if flow else WIDTH,
    )
    return text.removesuffix("\n").removesuffix("\n...")
