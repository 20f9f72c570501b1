"""Reads one value of a run file as the type of its field; a value of another kind is refused, never converted by guess."""

from __future__ import annotations

import math
import re

import yaml
from google.protobuf.descriptor import FieldDescriptor

_NUMBER = re.compile(r"[-+]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][-+]?\d+)?")
_LEADING_ZERO = re.compile(r"[-+]?0[\d_]+")
_NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity|nan)", re.IGNORECASE)
_NULLS = {"", "~", "null", "Null", "NULL"}
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_YES_NO = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
AUTOMATIC = frozenset({"micro_batch_tokens"})
"""Fields of numbers that the word auto leaves to the training process."""
_LIMITS = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
}


def is_null(node: yaml.Node) -> bool:
    """True if `node` is empty: nothing, `~` or `null`, outside quotes."""
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value in _NULLS


def is_auto(field: FieldDescriptor, node: yaml.Node) -> bool:
    """True if `node` is the word auto for a field of AUTOMATIC, which is like leaving the field out."""
    return field.name in AUTOMATIC and isinstance(node, yaml.ScalarNode) and node.value == "auto"


def describe(node: yaml.Node) -> str:
    """Describes `node` for an error sentence, such as '"abc" is text'."""
    if isinstance(node, yaml.MappingNode):
        return "this is a set of fields"
    if isinstance(node, yaml.SequenceNode):
        return "this is a list"
    text: str = node.value
    if is_null(node):
        return "this is empty"
    is_bare = isinstance(node, yaml.ScalarNode) and node.style is None
    if is_bare and text in _BOOLEANS:
        return f"{text} is a boolean"
    if is_bare and (_NUMBER.fullmatch(text) or _NOT_FINITE.fullmatch(text)):
        return f"{text} is a number"
    return f'"{text if len(text) <= 60 else text[:57] + "..."}" is text'


def read_value(field: FieldDescriptor, node: yaml.ScalarNode, *, verbatim: bool) -> str | bool | int | float:
    """The value of `node` in the type of `field`.

    `verbatim` is for the command line, where nothing is quoted: text is taken as it stands.
    Raises ValueError with a sentence for people.
    """
    match field.type:
        case FieldDescriptor.TYPE_STRING:
            return _text(node, verbatim=verbatim)
        case FieldDescriptor.TYPE_BOOL:
            return _boolean(node)
        case FieldDescriptor.TYPE_DOUBLE:
            return _number(node)
        case _:
            return _whole_number(field, node)


def _text(node: yaml.ScalarNode, *, verbatim: bool) -> str:
    """The text, with the halves of JSON's escapes such as \\ud83d\\ude00 made one character."""
    text: str = node.value
    if not verbatim and node.style is None and (text in _BOOLEANS or _NUMBER.fullmatch(text)):
        raise ValueError(f'expects text; {describe(node)}: write "{text}" in quotes.')
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise ValueError(f"{text!a} has half of a surrogate pair, which is not a character.") from None


def _boolean(node: yaml.ScalarNode) -> bool:
    if node.style is None and node.value in _BOOLEANS:
        return _BOOLEANS[node.value]
    meant = _YES_NO.get(node.value.lower()) or _BOOLEANS.get(node.value)
    remedy = f": write {str(meant).lower()}" if meant is not None else ""
    raise ValueError(f"expects true or false; {describe(node)}{remedy}.")


def _whole_number(field: FieldDescriptor, node: yaml.ScalarNode) -> int:
    # protobuf's own JSON writes 64-bit numbers in quotes.
    quoted_is_fine = field.type == FieldDescriptor.TYPE_INT64
    text = _number_text(node, "a whole number", quoted_is_fine=quoted_is_fine)
    if re.fullmatch(r"[-+]?\d+", text):
        value = int(text) if len(text) <= 20 else 2**64
    else:
        number = float(text)
        if not math.isfinite(number) or not number.is_integer():
            raise ValueError(f"expects a whole number; {node.value} is not one.")
        value = int(number)
    low, high = _LIMITS[field.type]
    if not low <= value <= high:
        raise ValueError(f"{node.value} is outside [{low}, {high}].")
    return value


def _number(node: yaml.ScalarNode) -> float:
    value = float(_number_text(node, "a number", quoted_is_fine=False))
    if not math.isfinite(value):
        raise ValueError(f"expects a finite number; {node.value} is too large.")
    return value


def _number_text(node: yaml.ScalarNode, expected: str, *, quoted_is_fine: bool) -> str:
    text: str = node.value
    if _NOT_FINITE.fullmatch(text):
        raise ValueError(f"expects a finite number; {text} is not one.")
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"expects {expected}; {describe(node)}.")
    if node.style is not None and not quoted_is_fine:
        raise ValueError(f"expects {expected}; {describe(node)}: write {text} without quotes.")
    if _LEADING_ZERO.fullmatch(text):
        raise ValueError(f"expects {expected}; {text} begins with 0, which some readers take for octal.")
    return text.replace("_", "")
