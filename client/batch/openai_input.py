"""Parses rows of OpenAI's batch files; fields without effect are ignored, unsupported ones are refused by name."""

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
)
from stillhouse.protos.errors import StillhouseError
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
_OWN = {"chat": {"messages", "top_logprobs"}, "completions": {"prompt"}}
# Fields without effect on the text, whatever their value.
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "stream_options", "parallel_tool_calls", "request_id", "priority"),
    *("return_tokens_as_token_ids", "skip_special_tokens"),
}
# Fields without effect at these values; null never has an effect.
_HARMLESS: Mapping[str, tuple[Any, ...]] = {
    "stream": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
}
_ROLES = {"developer": "system"}
_TURN = {"role", "content", "name"}


def openai_row(
    line: InputLine, sampling: Sampling, *, max_tokens: int, resolve_adapter: Callable[[str], str]
) -> PromptRow:
    """Parses a row with `custom_id`, `method`, `url` and `body`.

    A chat without max_tokens may be `max_tokens` long; `resolve_adapter` maps a `model` to an adapter.
    """
    values: dict[str, Any] = {}
    interface: Any = ""
    try:
        values = parse_object(line)
        interface, body = _envelope(values)
        _check_fields(body, interface)
        n = parse_integer(body, "n", 1, MAX_SAMPLES)
        num_samples = sampling.num_samples if n is None else n
        params = _params(body, sampling, interface, max_tokens)
        adapter = resolve_adapter(_model(body)) or sampling.adapter
        prompts = _prompts(body, interface)
        for prompt in prompts:
            prompt.adapter = adapter
            prompt.sampling.CopyFrom(params)
        return PromptRow(
            line=line,
            id=values.get("custom_id"),
            values=values,
            prompts=prompts,
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
        raise invalid(f"method is {values['method']!r:.40}; it must be POST.")
    interface = INTERFACES.get(str(values.get("url")))
    if interface is None:
        raise invalid(f"url is {values.get('url')!r:.80}; this teacher supports {' and '.join(INTERFACES)}.")
    if not isinstance(values.get("body"), dict):
        raise invalid("body is missing; it must be an object.")
    return interface, values["body"]


def _check_fields(body: Mapping[str, Any], interface: str) -> None:
    """Raises StillhouseError for the first field that would have to change the text and cannot."""
    for name, value in body.items():
        if name in _SHARED or name in _OWN[interface] or name in _IGNORED or value is None:
            continue
        if not any(_same(value, each) for each in _HARMLESS.get(name, ())):
            raise invalid(
                f"body.{name} is not supported: this teacher samples by temperature, top_p, top_k, max_tokens, seed "
                f"and stop. Remove {name}."
            )


def _same(value: Any, harmless: Any) -> bool:
    return bool(value == harmless) and isinstance(value, bool) == isinstance(harmless, bool)


def _model(body: Mapping[str, Any]) -> str:
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise invalid("body.model must be text.")
    return model or ""


def _params(
    body: Mapping[str, Any], sampling: Sampling, interface: str, max_tokens: int
) -> teacher_pb2.SamplingParams:
    given = None
    for name in ("max_completion_tokens", "max_tokens"):
        given = parse_integer(body, name, 1, 2**31 - 1) if given is None else given
    if given is None and sampling.max_new_tokens is None:
        given = max_tokens if interface == "chat" else COMPLETION_TOKENS
    return parse_sampling({**body, "max_new_tokens": given}, sampling)


def _prompts(body: Mapping[str, Any], interface: str) -> tuple[teacher_pb2.Prompt, ...]:
    if interface == "chat":
        return (parse_prompt(_turns(body.get("messages")), "messages"),)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt:
        if all(type(each) is int for each in prompt):
            return (parse_prompt(prompt, "prompt of token ids"),)
        return tuple(
            parse_prompt(each, "prompt" if isinstance(each, str) else "prompt of token ids")
            for each in prompt
        )
    return (parse_prompt(prompt, "prompt"),)


def _turns(messages: Any) -> Any:
    """Reduces messages to text: parts of text are joined, anything else is refused by name."""
    if not isinstance(messages, list):
        return messages
    turns = []
    for index, each in enumerate(messages):
        if not isinstance(each, dict):
            return messages  # parse_prompt reports it
        for name, value in each.items():
            if name not in _TURN and value not in (None, [], ""):
                raise invalid(f"messages[{index}].{name} is not supported; a message has role and content.")
        role, content = each.get("role"), each.get("content")
        if isinstance(content, list):
            content = "".join(
                _part(part, f"messages[{index}].content[{at}]") for at, part in enumerate(content)
            )
        turns.append({"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content})
    return turns


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise invalid(f"{where} is of type {kind!r:.40}; this teacher supports text.")


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
        raise invalid("body.logprobs must be true or false.")
    top = parse_integer(body, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top and not logprobs:
        raise invalid("body.top_logprobs needs logprobs: true.")
    return (top or 0) if logprobs else None
