"""Conversations of rows: messages, tool calls and tools in OpenAI's form, checked and brought to that of chat templates.

Templates take arguments of a call as an object, which OpenAI writes as text: it is parsed once. A field is passed on or
refused by name, never dropped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stillhouse.protos.rows.field_error import FieldError, kind_of, require_unicode, shown

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of an assistant's reasoning in rows and in templates; the first is that of the contract."""
MESSAGE_FIELDS = (
    *(
        "role",
        "content",
        "name",
        "tool_calls",
        "function_call",
        "tool_call_id",
        *REASONING,
        "weight",
        "train",
    ),
)
UNUSED_MESSAGE_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "refusal": ("",),
    "audio": (),
    "annotations": ([],),
    "images": ([],),
    "prefix": (False,),
    "partial": (False,),
}
"""Fields without effect at these values and at null; refused at any other."""
OPTIONS = "chat_template_kwargs"
"""The field of a row that holds further variables of the template."""
RESERVED_OPTIONS = frozenset(
    {
        *(
            "messages",
            "tools",
            "documents",
            "conversation",
            "conversations",
            "chat_template",
            "tokenize",
            "padding",
        ),
        *(
            "truncation",
            "max_length",
            "return_tensors",
            "return_dict",
            "return_assistant_tokens_mask",
            "self",
        ),
        *(
            "tokenizer_kwargs",
            "add_generation_prompt",
            "continue_final_message",
            "strftime_now",
            "raise_exception",
        ),
        *("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token"),
        *("additional_special_tokens", "compiled_template"),
    }
)
"""Variables that the program or the tokenizer sets."""
MAX_TOOL_CALLS = 256
MAX_JSON_DEPTH = 64

_PLAIN = {"role", "content"}

Message = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Turns:
    """A checked conversation."""

    messages: tuple[Message, ...]
    """Messages as templates take them: `content` is text or None; `tool_calls` have `arguments` as objects."""
    tools: tuple[Message, ...] = ()
    """Tools that the model may call, as JSON Schema."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, such as enable_thinking."""
    trained: tuple[bool, ...] = ()
    """For each message True if it is a turn of the assistant whose weight is not 0."""
    has_weight_0: bool = False
    """A turn of the assistant has weight 0."""
    extra: tuple[str, ...] = ()
    """Paths of fields that no rule knows, in the order of the row."""


def parse_turns(messages: Any, tools: Any = None, options: Any = None, *, name: str = "messages") -> Turns:
    """Checks messages, tools and template options of a row; the latter two may be JSON text. Raises FieldError."""
    if not isinstance(messages, list | tuple) or not messages:
        given = "empty" if isinstance(messages, list | tuple) else kind_of(messages)
        raise FieldError(name, f"is {given}; it must be an array of at least one message.")
    parsed = [_message(each, f"{name}[{index}]") for index, each in enumerate(messages)]
    extra = [
        f"{name}[{index}].{key}"
        for index, each in enumerate(messages)
        for key, value in each.items()
        if value is not None and key not in MESSAGE_FIELDS and key not in UNUSED_MESSAGE_FIELDS
    ]
    return Turns(
        messages=tuple(message for message, _ in parsed),
        tools=parse_tools(tools),
        options=parse_options(options),
        trained=tuple(message["role"] == "assistant" and weight > 0 for message, weight in parsed),
        has_weight_0=any(weight == 0 for _, weight in parsed),
        extra=tuple(extra),
    )


def parse_tools(tools: Any, field: str = "tools") -> tuple[Message, ...]:
    """Checks a list of tools, which may be JSON text, as files of tables hold it. Raises FieldError."""
    if isinstance(tools, str):
        tools = parse_json(tools, field) if tools.strip() else None
    if tools is None:
        return ()
    if not isinstance(tools, list | tuple):
        raise FieldError(field, f"is {kind_of(tools)}; it must be an array of tools.")
    for index, tool in enumerate(tools):
        where = f"{field}[{index}]"
        if not isinstance(tool, dict):
            raise FieldError(where, f"is {kind_of(tool)}; it must be an object.")
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise FieldError(f"{where}.function.name", "is missing; a tool is a function with a name.")
        if tool.get("type", "function") != "function":
            raise FieldError(f"{where}.type", f'is {shown(tool["type"])}; it must be "function".')
        _check_json(tool, where)
    return tuple(tools)


def is_json_list(text: str) -> bool:
    """Returns True for text that is meant as a JSON list, and not as the name of a file with one; an empty text is one."""
    return not text.strip() or text.lstrip().startswith("[")


def parse_options(options: Any, field: str = OPTIONS) -> Mapping[str, Any]:
    """Checks further variables of a template, which may be JSON text. Raises FieldError."""
    if isinstance(options, str):
        options = parse_json(options, field) if options.strip() else None
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise FieldError(field, f"is {kind_of(options)}; it must be an object.")
    for name in options:
        if not str(name).isidentifier() or name in RESERVED_OPTIONS:
            raise FieldError(field, f"has {shown(name)}, which is no variable of a row's own. Remove it.")
    _check_json(options, field)
    return dict(options)


def parse_json(text: str, field: str) -> Any:
    """Parses JSON text inside a row. Raises FieldError, also for what templates could not write again."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FieldError(field, f"is not JSON ({error}); write JSON, or the value itself.") from error
    _check_json(value, field)
    return value


def _message(message: Any, where: str) -> tuple[dict[str, Any], float]:
    """Returns a message for templates, and its weight."""
    given = _given(message, where)
    if given.keys() == _PLAIN and all(isinstance(value, str) and value for value in given.values()):
        require_unicode(given["role"] + given["content"], f"{where}.content")
        return given, 1.0
    role = given.pop("role", None)
    if not isinstance(role, str) or not role:
        raise FieldError(f"{where}.role", f"is {kind_of(role)}; it must be a string.")
    result: dict[str, Any] = {"role": require_unicode(role, f"{where}.role"), "content": None}
    content = given.pop("content", None)
    if content is not None:
        result["content"] = _content(content, f"{where}.content")
    calls = _calls(given, where)
    reasoning = _reasoning(given, where)
    own = {name: value for name, value in (("tool_calls", calls), (REASONING[0], reasoning)) if value}
    if own and role != "assistant":
        raise FieldError(
            f"{where}.{next(iter(own))}", f'is of a turn of {shown(role)}; only "assistant" has it.'
        )
    result |= own
    if result["content"] is None and not (calls or reasoning):
        raise FieldError(f"{where}.content", "is missing; it must be a string.")
    for name in ("tool_call_id", "name"):
        if text := given.pop(name, None):
            if not isinstance(text, str):
                raise FieldError(f"{where}.{name}", f"is {kind_of(text)}; it must be a string.")
            result[name] = require_unicode(text, f"{where}.{name}")
    weight = _weight(given.pop("weight", None), role, f"{where}.weight")
    weight = _train(given.pop("train", None), role, weight, f"{where}.train")
    for name, value in given.items():
        allowed = UNUSED_MESSAGE_FIELDS.get(name)
        if allowed is None:
            result[name] = value
        elif value not in allowed:
            raise FieldError(f"{where}.{name}", "is not supported. Remove it.")
    return result, weight


def _given(message: Any, where: str) -> dict[str, Any]:
    """Returns the fields of a message that are not null."""
    if not isinstance(message, dict):
        raise FieldError(where, f"is {kind_of(message)}; it must be an object.")
    given = {name: value for name, value in message.items() if value is not None}
    if given.get("role") == "function":  # OpenAI's former name
        given["role"] = "tool"
    return given


def _content(content: Any, where: str) -> str:
    """Returns text; parts of text are joined, anything else is refused by its type."""
    if isinstance(content, list | tuple):
        content = "".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))
    if not isinstance(content, str):
        raise FieldError(where, f"is {kind_of(content)}; it must be a string.")
    return require_unicode(content, where)


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if not isinstance(part, dict):
        raise FieldError(where, f'is {kind_of(part)}; it must be an object of type "text".')
    if part.get("type") == "text":
        raise FieldError(f"{where}.text", f"is {kind_of(part.get('text'))}; it must be a string.")
    raise FieldError(
        where,
        f'is of type {shown(part.get("type"))}; only parts of type "text" are supported. Remove the part, or the row.',
    )


def _calls(given: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Takes the calls out of a message's fields; `function_call` is OpenAI's former name of a single one."""
    calls = _tool_calls(given.pop("tool_calls", None), f"{where}.tool_calls")
    call = given.pop("function_call", None)
    if call is None:
        return calls
    if calls:
        raise FieldError(f"{where}.function_call", "is given beside tool_calls. Give one of them.")
    return [_tool_call(call, f"{where}.function_call")]


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(calls, str):
        calls = parse_json(calls, where) if calls.strip() else []
    if calls is None:
        return []
    if not isinstance(calls, list | tuple):
        raise FieldError(where, f"is {kind_of(calls)}; it must be an array of calls.")
    if len(calls) > MAX_TOOL_CALLS:
        raise FieldError(
            where, f"has {len(calls)} calls; at most {MAX_TOOL_CALLS} are taken. Split the turn."
        )
    return [_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """Returns a call as {"id", "type", "function": {"name", "arguments"}}; flat ones are brought to this form."""
    if not isinstance(call, dict):
        raise FieldError(where, f"is {kind_of(call)}; it must be an object.")
    if (kind := call.get("type")) not in (None, "function"):
        raise FieldError(f"{where}.type", f'is {shown(kind)}; it must be "function".')
    is_flat = call.get("function") is None
    function = call if is_flat else call["function"]
    inside = where if is_flat else f"{where}.function"
    if not isinstance(function, dict):
        raise FieldError(inside, f"is {kind_of(function)}; it must be an object.")
    outer = {"id", "type", "function", "index", *(("name", "arguments") if is_flat else ())}
    for fields, allowed, place in ((call, outer, where), (function, outer | {"name", "arguments"}, inside)):
        for name, value in fields.items():
            if value is not None and name not in allowed:
                raise FieldError(f"{place}.{name}", "is not supported in a tool call. Remove it.")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise FieldError(f"{inside}.name", f"is {kind_of(name)}; a tool call names its tool.")
    arguments = parse_arguments(function.get("arguments"), f"{inside}.arguments")
    result: dict[str, Any] = {
        "type": "function",
        "function": {"name": require_unicode(name, f"{inside}.name"), "arguments": arguments},
    }
    if call.get("id") is not None:
        if not isinstance(call["id"], str):
            raise FieldError(f"{where}.id", f"is {kind_of(call['id'])}; it must be a string.")
        result = {"id": require_unicode(call["id"], f"{where}.id"), **result}
    return result


def parse_arguments(arguments: Any, where: str) -> dict[str, Any]:
    """Returns arguments of a call as an object, parsed once if they are text. Raises FieldError."""
    if isinstance(arguments, str):
        arguments = parse_json(arguments, where) if arguments.strip() else None
        if isinstance(arguments, str):
            raise FieldError(where, "is JSON text inside JSON text; encode the arguments once.")
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        raise FieldError(where, f"is {kind_of(arguments)}; it must be an object, or an object as JSON text.")
    _check_json(arguments, where)
    return arguments


def _reasoning(given: dict[str, Any], where: str) -> str:
    """Takes the reasoning out of a message's fields. Raises FieldError if two of its names differ."""
    found: dict[str, str] = {}
    for name in REASONING:
        value = given.pop(name, None)
        if value is None or value == "":
            continue
        if not isinstance(value, str):
            raise FieldError(f"{where}.{name}", f"is {kind_of(value)}; it must be a string.")
        found[name] = require_unicode(value, f"{where}.{name}")
    if len(set(found.values())) > 1:
        raise FieldError(f"{where}.{list(found)[1]}", f"differs from {next(iter(found))}. Give one of them.")
    return next(iter(found.values()), "")


def _weight(weight: Any, role: str, where: str) -> float:
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or weight not in (0, 1):
        raise FieldError(where, f"is {shown(weight)}; it must be 0, to leave the turn untrained, or 1.")
    if role != "assistant":
        raise FieldError(where, f'is of a turn of {shown(role)}; only "assistant" has it. Remove it.')
    return float(weight)


def _train(train: Any, role: str, weight: float, where: str) -> float:
    """Returns the weight of a turn that says itself if it is learnt."""
    if train is None:
        return weight
    if train not in (0, 1):
        raise FieldError(where, f"is {shown(train)}; it must be true or false.")
    if role != "assistant":
        if train:
            raise FieldError(
                where, f'is true in a turn of {shown(role)}; only "assistant" is learnt. Remove it.'
            )
        return weight
    if train and weight == 0:
        raise FieldError(where, "is true beside weight 0. Give one of them.")
    return float(train)


def _check_json(value: Any, field: str) -> None:
    """Raises FieldError for values that no template could write as JSON text of a tokenizer."""
    if _depth(value, MAX_JSON_DEPTH) > MAX_JSON_DEPTH:
        raise FieldError(field, f"is nested more than {MAX_JSON_DEPTH} deep. Flatten it.")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise FieldError(
            field, f"cannot be written as JSON ({error}). Give numbers, text, lists and objects."
        ) from error
    require_unicode(text, field)


def _depth(value: Any, limit: int) -> int:
    """Returns the nesting of lists and objects, counted at most to one more than `limit`."""
    depth, level = 0, [value]
    while level and depth <= limit:
        level = [
            child
            for each in level
            if isinstance(each, dict | list | tuple)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
        depth += 1
    return depth


def with_system(messages: Sequence[Any], system: Any) -> list[Any]:
    """Puts a row's `system` before its messages. Raises FieldError if they begin with another system prompt."""
    if not isinstance(system, str):
        raise FieldError("system", f"is {kind_of(system)}; it must be a string.")
    first = messages[0] if messages else None
    if isinstance(first, dict) and first.get("role") in ("system", "developer"):
        if first.get("content") == system:
            return list(messages)
        raise FieldError("system", "differs from the system message of the row. Give one of them.")
    return [{"role": "system", "content": system}, *messages]
