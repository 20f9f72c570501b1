"""Conversations on the wire, both ways, with the contract's limits."""

from __future__ import annotations

import json
from typing import Any

from stillhouse.protos.rows.conversation import OPTIONS, Turns, parse_turns
from stillhouse.protos.rows.field_error import FieldError
from stillhouse.protos.stillhouse.v1 import teacher_pb2

MAX_JSON_BYTES = 1 << 20
"""Size of tools, of options, and of the arguments of a call."""


def to_wire(turns: Turns) -> teacher_pb2.Conversation:
    """Encodes a conversation. Raises FieldError for JSON above the limit."""
    tools = _json(list(turns.tools), "tools") if turns.tools else ""
    return teacher_pb2.Conversation(
        messages=[_message(message, f"messages[{at}]") for at, message in enumerate(turns.messages)],
        tools=tools,
        chat_template_kwargs=_json(dict(turns.options), OPTIONS) if turns.options else "",
    )


def from_wire(conversation: teacher_pb2.Conversation) -> Turns:
    """Decodes and checks a conversation of at least one message. Raises FieldError."""
    _check_size(conversation.tools, "tools")
    _check_size(conversation.chat_template_kwargs, OPTIONS)
    messages = []
    for at, message in enumerate(conversation.messages):
        if message.no_content and message.content:
            raise FieldError(f"messages[{at}].no_content", "is set beside content. Give one of them.")
        values: dict[str, Any] = {
            "role": message.role,
            "content": None if message.no_content else message.content,
            "tool_calls": [],
            **{name: getattr(message, name) for name in ("reasoning_content", "tool_call_id", "name")},
        }
        for index, call in enumerate(message.tool_calls):
            _check_size(call.arguments, f"messages[{at}].tool_calls[{index}].arguments")
            function = {"name": call.name, "arguments": call.arguments}
            values["tool_calls"].append({"id": call.id or None, "type": "function", "function": function})
        messages.append(values)
    return parse_turns(messages, conversation.tools, conversation.chat_template_kwargs)


def _message(message: Any, where: str) -> teacher_pb2.Message:
    calls = [
        teacher_pb2.ToolCall(
            id=call.get("id", ""),
            name=call["function"]["name"],
            arguments=_json(call["function"]["arguments"], f"{where}.tool_calls[{index}].arguments"),
        )
        for index, call in enumerate(message.get("tool_calls", ()))
    ]
    return teacher_pb2.Message(
        role=message["role"],
        content=message["content"] or "",
        no_content=message["content"] is None,
        tool_calls=calls,
        reasoning_content=message.get("reasoning_content", ""),
        tool_call_id=message.get("tool_call_id", ""),
        name=message.get("name", ""),
    )


def _json(value: Any, field: str) -> str:
    text = json.dumps(value, ensure_ascii=False)
    _check_size(text, field)
    return text


def _check_size(text: str, field: str) -> None:
    if len(text) > MAX_JSON_BYTES or len(text.encode()) > MAX_JSON_BYTES:
        raise FieldError(field, f"is JSON of more than {MAX_JSON_BYTES} bytes. Shorten it.")
