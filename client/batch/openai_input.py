"""Parses rows of OpenAI's batch files; fields of a body that would change the text and cannot are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from stillhouse.client.batch.input_rows import (
    MAX_SAMPLES,
    InputLine,
    PromptRow,
    Sampling,
    invalid,
    parse_integer,
    parse_object,
    parse_prompt,
    parse_sampling,
    text_field,
)
from stillhouse.client.core.errors import field_errors
from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rows.conversation import OPTIONS, parse_turns
from stillhouse.protos.rows.field_error import FieldError, kind_of
from stillhouse.protos.rows.known_fields import ExtraFields, check_fields, has_no_effect, without_effect
from stillhouse.protos.rows.wire import to_wire
from stillhouse.protos.stillhouse.v1 import teacher_pb2

INTERFACES = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
"""`url` to interface."""
COMPLETION_TOKENS = 16
"""Default max_tokens of /v1/completions."""
MAX_TOP_LOGPROBS = 20

_SHARED = {
    *("model", "n", "temperature", "top_p", "top_k", "max_tokens", "max_completion_tokens", "seed", "stop"),
    "logprobs",
}
_OWN = {"chat": {"messages", "tools", OPTIONS, "top_logprobs"}, "completions": {"prompt"}}
# Fields without effect on the text, whatever their value.
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "stream_options", "request_id", "priority"),
    "return_tokens_as_token_ids",
}
_ENVELOPE = {"custom_id", "method", "url", "body"}
_ROLES = {"developer": "system"}


def openai_row(
    line: InputLine,
    sampling: Sampling,
    *,
    max_tokens: int,
    resolve_adapter: Callable[[str], str],
    extra_fields: ExtraFields = "keep",
) -> PromptRow:
    """Parses a row with `custom_id`, `method`, `url` and `body`.

    A chat without max_tokens may be `max_tokens` long; `resolve_adapter` maps a `model` to an adapter.
    """
    values: dict[str, Any] = {}
    interface: Any = ""
    try:
        values = parse_object(line)
        interface, body = _envelope(values)
        with field_errors():
            check_fields(values, known=_ENVELOPE, no_effect={}, extra=extra_fields)
        _check_fields(body, interface)
        n = parse_integer(body, "n", 1, MAX_SAMPLES)
        num_samples = sampling.num_samples if n is None else n
        params = _params(body, sampling, interface, max_tokens)
        adapter = resolve_adapter(text_field(body, "model")) or sampling.adapter
        with field_errors():
            prompts, content = _prompts(body, interface)
        for prompt in prompts:
            prompt.adapter = adapter
            prompt.sampling.CopyFrom(params)
        return PromptRow(
            line=line,
            id=values.get("custom_id"),
            values=values,
            prompts=prompts,
            content=content,
            num_samples=num_samples,
            interface=interface,
            top_logprobs=_top_logprobs(body, interface),
        )
    except StillhouseError as error:
        return PromptRow(
            line=line, id=values.get("custom_id"), values=values, interface=interface, error=error
        )


def _envelope(values: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    if values.get("method", "POST") != "POST":
        raise invalid(f"method is {kind_of(values['method'])}; it must be POST.")
    interface = INTERFACES.get(str(values.get("url")))
    if interface is None:
        raise invalid(
            f"url is {kind_of(values.get('url'))}; this teacher supports {' and '.join(INTERFACES)}."
        )
    if not isinstance(values.get("body"), dict):
        raise invalid(f"body is {kind_of(values.get('body'))}; it must be an object.")
    return interface, values["body"]


def _check_fields(body: Mapping[str, Any], interface: str) -> None:
    """Raises StillhouseError for the first field that would have to change the text and cannot."""
    no_effect = {**without_effect(has_tools=bool(body.get("tools"))), "tools": ([],), OPTIONS: ({},)}
    for name, value in body.items():
        if name in _SHARED or name in _OWN[interface] or name in _IGNORED:
            continue
        if not has_no_effect(name, value, no_effect):
            raise invalid(
                f"body.{name} is not supported: this teacher samples by temperature, top_p, top_k, max_tokens, seed "
                f"and stop. Remove {name}."
            )


def _params(
    body: Mapping[str, Any], sampling: Sampling, interface: str, max_tokens: int
) -> teacher_pb2.SamplingParams:
    given = None
    for name in ("max_completion_tokens", "max_tokens"):
        given = parse_integer(body, name, 1, 2**31 - 1) if given is None else given
    if given is None and sampling.max_new_tokens is None:
        given = max_tokens if interface == "chat" else COMPLETION_TOKENS
    return parse_sampling({**body, "max_new_tokens": given}, sampling)


def _prompts(
    body: Mapping[str, Any], interface: str
) -> tuple[tuple[teacher_pb2.Prompt, ...], tuple[Mapping[str, Any] | None, ...]]:
    """Returns the prompts of a body, and for each its fields in a training row. Raises FieldError and StillhouseError."""
    if interface == "chat":
        messages = _with_roles(body.get("messages"))
        turns = parse_turns(messages, body.get("tools"), body.get(OPTIONS))
        if turns.extra:
            raise FieldError(turns.extra[0], "is not supported. Remove it.")
        content = {"messages": messages}
        content |= {name: body[name] for name in ("tools", OPTIONS) if body.get(name)}
        return (teacher_pb2.Prompt(conversation=to_wire(turns)),), (content,)
    prompt = body.get("prompt")
    texts = [prompt]
    if isinstance(prompt, list) and prompt and not all(type(each) is int for each in prompt):
        texts = prompt
    return (
        tuple(
            parse_prompt(each, "prompt of token ids" if isinstance(each, list) else "prompt")
            for each in texts
        ),
        tuple({"prompt": each} if isinstance(each, str) else None for each in texts),
    )


def _with_roles(messages: Any) -> Any:
    """Returns messages with the roles that templates know; what is no list of messages is reported later."""
    if not isinstance(messages, list):
        return messages
    return [
        {**each, "role": _ROLES.get(each["role"], each["role"])}
        if isinstance(each, dict) and isinstance(each.get("role"), str)
        else each
        for each in messages
    ]


def _top_logprobs(body: Mapping[str, Any], interface: str) -> int | None:
    """Returns the candidates to report at each position, 0 for the token alone, None without logprobs."""
    if interface == "completions":
        return (
            parse_integer(body, "logprobs", 0, MAX_TOP_LOGPROBS)
            if body.get("logprobs") is not False
            else None
        )
    logprobs = body.get("logprobs")
    if logprobs not in (None, False, True):
        raise invalid(f"body.logprobs is {kind_of(logprobs)}; it must be true or false.")
    top = parse_integer(body, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top and not logprobs:
        raise invalid("body.top_logprobs needs logprobs: true.")
    return (top or 0) if logprobs else None
