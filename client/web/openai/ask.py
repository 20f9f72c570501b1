"""Completions that a request asks for, read from the body of either path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stillhouse.client.teacher.generate import as_prompt
from stillhouse.client.web.api.messages import invalid
from stillhouse.client.web.openai.fields import Body, unicode_text
from stillhouse.protos.rows.conversation import OPTIONS
from stillhouse.protos.rows.field_error import shown
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor

MAX_PROMPTS = 1024
MAX_CHOICES = 128
"""Limit for one prompt."""
MAX_STOP_STRINGS = 64
MAX_MODEL_CHARS = 4096
DEFAULT_NEW_TOKENS = 16
"""Default of a completion; a chat goes on to the model's length."""
_INT64 = 2**63
_INT32 = 2**31 - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """One request, checked as far as that can be done without the teacher."""

    is_chat: bool
    model: str
    prompts: tuple[teacher_pb2.Prompt, ...]
    n: int
    """Choices of each prompt."""
    sampling: teacher_pb2.SamplingParams
    """Without max_new_tokens."""
    max_tokens: int | None
    """None: to the model's length."""
    logprobs: int | None
    """Likeliest tokens to report at each position; None reports nothing."""
    logprobs_field: str
    """Name of the field that gives their number."""
    echo: bool
    stream: bool
    include_usage: bool
    """Send the usage at the end of the stream."""
    has_tools: bool = False
    """The model may call tools."""


def completion_ask(values: Mapping[str, Any]) -> Ask:
    """Reads a body of /v1/completions. Raises StillhouseError(INVALID_REQUEST)."""
    body = Body(values)
    prompts = _prompts(body.take("prompt"))
    max_tokens = body.integer("max_tokens", least=0, most=_INT32)
    logprobs = body.integer("logprobs", least=0, most=_INT32)
    echo = body.boolean("echo")
    if max_tokens == 0 and not echo:
        raise invalid("max_tokens", "it is 0, and there is no echo; give 1 or more, or set echo.")
    n = body.integer("n", least=1, most=MAX_CHOICES) or 1
    if body.integer("best_of", least=1, most=MAX_CHOICES) not in (None, n):
        raise invalid("best_of", "only the number of n is served; leave it out.")
    return _ask(
        body,
        is_chat=False,
        prompts=prompts,
        n=n,
        max_tokens=DEFAULT_NEW_TOKENS if max_tokens is None else max_tokens,
        logprobs=logprobs,
        logprobs_field="logprobs",
        echo=echo,
    )


def chat_ask(values: Mapping[str, Any]) -> Ask:
    """Reads a body of /v1/chat/completions. Raises StillhouseError(INVALID_REQUEST)."""
    body = Body(values)
    prompt = _conversation(body)
    limits = [body.integer(name, least=1, most=_INT32) for name in ("max_tokens", "max_completion_tokens")]
    if None not in limits and limits[0] != limits[1]:
        raise invalid("max_completion_tokens", "it differs from max_tokens; give one of them.")
    top = body.integer("top_logprobs", least=0, most=_INT32)
    wants_logprobs = body.boolean("logprobs")
    if top is not None and not wants_logprobs:
        raise invalid("top_logprobs", "it needs logprobs: true; set that too.")
    return _ask(
        body,
        is_chat=True,
        prompts=(prompt,),
        n=body.integer("n", least=1, most=MAX_CHOICES) or 1,
        max_tokens=limits[0] or limits[1],
        logprobs=(top or 0) if wants_logprobs else None,
        logprobs_field="top_logprobs",
        echo=False,
        has_tools=bool(prompt.conversation.tools),
    )


def request_of(ask: Ask, max_sequence_tokens: int) -> teacher_pb2.GenerateRequest:
    """The call that continues the prompts of `ask` on a teacher of such sequences."""
    request = teacher_pb2.GenerateRequest(
        prompts=ask.prompts,
        sampling=ask.sampling,
        num_samples=ask.n,
        whole_samples=not ask.stream,
    )
    request.sampling.max_new_tokens = ask.max_tokens or max_sequence_tokens
    if ask.logprobs is not None:
        request.distributions.top_k = ask.logprobs
        request.distributions.logprob_dtype = Tensor.DATA_TYPE_FLOAT32
    return request


def _ask(body: Body, **known: Any) -> Ask:
    stream = body.boolean("stream")
    ask = Ask(
        model=body.text("model", most=MAX_MODEL_CHARS),
        sampling=_sampling(body),
        stream=stream,
        include_usage=_include_usage(body.take("stream_options"), stream=stream),
        **known,
    )
    body.end()
    return ask


def _sampling(body: Body) -> teacher_pb2.SamplingParams:
    stop = body.take("stop", default=[])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > MAX_STOP_STRINGS:
        raise invalid("stop", f"give a string, or a list of at most {MAX_STOP_STRINGS}.")
    return teacher_pb2.SamplingParams(
        temperature=body.number("temperature", least=0, most=1000),
        top_p=body.number("top_p", least=0, most=1),
        top_k=body.integer("top_k", least=0, most=_INT32),
        seed=body.integer("seed", least=-_INT64, most=_INT64 - 1),
        stop=[unicode_text(each, "stop") for each in stops],
    )


def _include_usage(options: Any, *, stream: bool) -> bool:
    if options is None:
        return False
    if not stream or not isinstance(options, dict):
        raise invalid("stream_options", "it is an object, and goes with stream: true alone.")
    inner = Body(options)
    usage = inner.boolean("include_usage")
    if inner.boolean("include_obfuscation"):
        raise invalid("stream_options.include_obfuscation", "it is not served; leave it out.")
    inner.end()
    return usage


def _prompts(prompt: Any) -> tuple[teacher_pb2.Prompt, ...]:
    many = prompt
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and _is_number(prompt[0])):
        many = [prompt]
    if not isinstance(many, list) or not 0 < len(many) <= MAX_PROMPTS:
        raise invalid(
            "prompt", f"give text, a list of token ids, or a list of 1 to {MAX_PROMPTS} of either kind."
        )
    return tuple(_prompt(each) for each in many)


def _prompt(prompt: Any) -> teacher_pb2.Prompt:
    if isinstance(prompt, str):
        return as_prompt(unicode_text(prompt, "prompt"), "")
    if not isinstance(prompt, list) or not prompt or not all(map(_is_number, prompt)):
        raise invalid("prompt", f"one is {shown(prompt)}; give text, or a list of at least one token id.")
    return as_prompt(prompt, "")


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _conversation(body: Body) -> teacher_pb2.Prompt:
    tools, choice = body.take("tools"), body.take("tool_choice", default="auto")
    if choice not in ("auto", "none"):
        raise invalid("tool_choice", f'it is {shown(choice)}; "auto" and "none" are served.')
    conversation: dict[str, Any] = {"messages": body.take("messages"), OPTIONS: body.take(OPTIONS)}
    if choice == "auto":
        conversation["tools"] = tools
    elif tools is not None and not isinstance(tools, list):
        raise invalid("tools", f"it is {shown(tools)}; give a list.")
    return as_prompt(conversation, "")
