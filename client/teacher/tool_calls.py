"""Calls of tools in the text of a model, for chat templates whose format is known; other text stays as it is."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from stillhouse.protos.rows.chat_template import select_template
from stillhouse.protos.rows.field_error import FieldError

Format = Literal["hermes", "llama3_json"]
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
"""Files of a tokenizer that may hold its chat template, the first of them that does."""
BEGIN, END = "<tool_call>", "</tool_call>"
_HERMES_OBJECT = '"name"'
_OTHER_XML = "<function="
"""Written by templates whose calls are tags and no JSON, between the same marks."""
_LLAMA_FORM = '{"name": function name, "parameters":'
_SPACES = " \t\r\n"


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call."""

    name: str
    arguments: str
    """JSON text of an object."""
    id: str

    def document(self) -> dict[str, Any]:
        """The call as OpenAI's API has it."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class Parsed:
    """Text of a model, taken apart."""

    content: str
    """Text beside the calls; all of it if there are none."""
    calls: tuple[ToolCall, ...] = ()


def format_of(files: Mapping[str, bytes]) -> Format | None:
    """The format that the chat template among a tokenizer's files asks for; None for an unknown one."""
    template = _template(files)
    if BEGIN in template and END in template and _HERMES_OBJECT in template and _OTHER_XML not in template:
        return "hermes"
    return "llama3_json" if _LLAMA_FORM in template else None


def parse(text: str, kind: Format | None) -> Parsed:
    """Takes complete text apart. A call that is no such JSON as its format has leaves all text as it is."""
    try:
        if kind == "hermes":
            return _hermes(text)
        if kind == "llama3_json" and text.lstrip(_SPACES).startswith("{"):
            return Parsed("", tuple(_llama_calls(text)))
    except (ValueError, RecursionError):
        pass
    return Parsed(text)


def choice_fields(parsed: Parsed, finish: str | None) -> tuple[dict[str, Any], str | None]:
    """Fields `content` and `tool_calls` of an answer's message, and its reason to end."""
    if not parsed.calls:
        return {"content": parsed.content}, finish
    calls = [each.document() for each in parsed.calls]
    fields = {"content": parsed.content or None, "tool_calls": calls}
    return fields, "tool_calls" if finish == "stop" else finish


class TextSplitter:
    """Splits a stream of text into what is content for sure and what may be a call."""

    def __init__(self, kind: Format | None) -> None:
        self._kind = kind
        self._held = ""
        self._begun = False

    def add(self, text: str) -> str:
        """Takes the next piece; returns what of the text so far is content."""
        self._held += text
        if self._kind == "hermes":
            return self._release(_sure(self._held))
        start = self._held.lstrip(_SPACES)
        if self._kind == "llama3_json" and not self._begun and (not start or start[0] == "{"):
            return ""  # an answer in this format is a call from its first character on
        return self._release(len(self._held))

    def end(self) -> Parsed:
        """Takes the rest apart."""
        held, self._held = self._held, ""
        parsed = parse(held, None if self._kind == "llama3_json" and self._begun else self._kind)
        if self._begun and parsed.calls and parsed.content:
            return Parsed(f"\n{parsed.content}", parsed.calls)
        return parsed

    def _release(self, length: int) -> str:
        released, self._held = self._held[:length], self._held[length:]
        self._begun = self._begun or bool(released)
        return released


def _sure(text: str) -> int:
    """Length of what of `text` is content, whatever follows: up to a mark or its beginning, and the blanks before that."""
    at = text.find(BEGIN)
    if at < 0:
        at = len(text) - next((n for n in range(len(BEGIN) - 1, 0, -1) if text.endswith(BEGIN[:n])), 0)
    return len(text[:at].rstrip(_SPACES))


def _hermes(text: str) -> Parsed:
    """Raises ValueError."""
    content: list[str] = []
    calls: list[ToolCall] = []
    rest = text
    while True:
        before, mark, after = rest.partition(BEGIN)
        if not mark and not calls:
            return Parsed(text)
        content.append(before.strip(_SPACES) if content else before)
        if not mark:
            break
        inside, _, rest = after.partition(END)  # a text that ends at its end token may lack the mark
        calls.append(_call(json.loads(inside), "arguments"))
    content[0] = content[0].rstrip(_SPACES)
    return Parsed("\n".join(filter(None, content)), tuple(calls))


def _llama_calls(text: str) -> Iterator[ToolCall]:
    """Raises ValueError."""
    decoder, rest = json.JSONDecoder(), text.strip(_SPACES)
    while rest:
        value, end = decoder.raw_decode(rest)
        yield _call(value, "parameters")
        rest = rest[end:].lstrip(_SPACES + ";")


def _call(value: Any, arguments_name: str) -> ToolCall:
    """Raises ValueError."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError("no call of a tool")  # noqa: TRY004 - as of text that is no JSON
    other = {"arguments": "parameters", "parameters": "arguments"}[arguments_name]
    arguments = value.get(arguments_name, value.get(other, {}))
    if not isinstance(arguments, dict):
        raise ValueError("arguments that are no object")  # noqa: TRY004 - likewise
    return ToolCall(
        name=value["name"],
        arguments=json.dumps(arguments, ensure_ascii=False),
        id=f"call_{secrets.token_hex(12)}",
    )


def _template(files: Mapping[str, bytes]) -> str:
    """Source of the template for conversations with tools; empty if there is none that can be read."""
    try:
        if TEMPLATE_FILES[0] in files:
            return files[TEMPLATE_FILES[0]].decode()
        for name in TEMPLATE_FILES[1:]:
            found = json.loads(files.get(name) or b"{}").get("chat_template")
            if isinstance(found, list):
                found = {each["name"]: each["template"] for each in found}
            if found:
                return select_template(found, [{"type": "function"}])
    except (ValueError, KeyError, TypeError, AttributeError, FieldError, RecursionError):
        pass
    return ""
