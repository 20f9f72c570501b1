"""Requests to generate and to score, read from JSON bodies: fields of the contract, with prompts as text, ids or messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from stillhouse.client.teacher.generate import as_prompt
from stillhouse.client.web.api.messages import fill_from_json, invalid
from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.rows.conversation import OPTIONS
from stillhouse.protos.stillhouse.v1 import teacher_pb2

MAX_SAMPLES = 64
MAX_ADAPTER_CHARS = 4096
MAX_TOP_K = 256
_CONVERSATION = ("messages", "tools", OPTIONS)
_INPUTS = ("text", "token_ids", "messages")


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateAsk:
    """A prompt to continue."""

    prompt: teacher_pb2.Prompt
    adapter: str
    sampling: teacher_pb2.SamplingParams
    num_samples: int
    top_k: int
    """Likeliest tokens to report at each position."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreAsk:
    """A text to score."""

    prompt: teacher_pb2.Prompt
    adapter: str
    top_k: int
    start: int
    """First position to report."""


def generate_ask(body: Mapping[str, Any]) -> GenerateAsk:
    """Reads a body of :generate. Raises StillhouseError(INVALID_REQUEST)."""
    left = dict(body)
    prompt = _prompt(left)
    adapter = _adapter(left)
    sampling = teacher_pb2.SamplingParams()
    _fill("sampling", sampling, left.pop("sampling", None))
    ask = GenerateAsk(
        prompt=prompt,
        adapter=adapter,
        sampling=sampling,
        num_samples=_integer(left, "num_samples", 1, least=1, most=MAX_SAMPLES),
        top_k=_integer(left, "top_k", 0, least=0, most=MAX_TOP_K),
    )
    _end(left)
    return ask


def score_ask(body: Mapping[str, Any]) -> ScoreAsk:
    """Reads a body of :score. Raises StillhouseError(INVALID_REQUEST)."""
    left = dict(body)
    ask = ScoreAsk(
        prompt=_prompt(left),
        adapter=_adapter(left),
        top_k=_integer(left, "top_k", 0, least=0, most=MAX_TOP_K),
        start=_integer(left, "start", 1, least=1, most=2**31 - 1),
    )
    _end(left)
    return ask


def _prompt(left: dict[str, Any]) -> teacher_pb2.Prompt:
    given = [name for name in _INPUTS if left.get(name) is not None]
    if len(given) != 1:
        raise invalid("", f"give one of {', '.join(_INPUTS)}; the body has {' and '.join(given) or 'none'}.")
    [name] = given
    value = left[name]
    if name != "messages" and any(left.get(each) is not None for each in _CONVERSATION):
        raise invalid(name, f"tools and {OPTIONS} go with messages alone.")
    if name == "text":
        if not isinstance(value, str) or not value:
            raise invalid("text", "give text that is not empty.")
        if not value.isascii() and any("\ud800" <= each <= "\udfff" for each in value):
            raise invalid("text", "it holds half of a surrogate pair, which is no Unicode.")
        prompt = as_prompt(value, "")
    elif name == "token_ids":
        if not isinstance(value, list) or not value or not all(map(_is_id, value)):
            raise invalid("token_ids", "give a list of at least one whole number in [0, 2^31).")
        prompt = as_prompt(value, "")
    else:
        try:
            prompt = as_prompt({each: left.get(each) for each in _CONVERSATION}, "")
        except StillhouseError as error:
            raise invalid("messages", error.message) from error
    for each in (*_INPUTS, *_CONVERSATION):
        left.pop(each, None)
    return prompt


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _adapter(left: dict[str, Any]) -> str:
    value = left.pop("adapter", None)
    if value is None:
        return ""
    if (
        not isinstance(value, str)
        or len(value) > MAX_ADAPTER_CHARS
        or any("\ud800" <= each <= "\udfff" for each in value)
    ):
        raise invalid("adapter", f"give a name of at most {MAX_ADAPTER_CHARS} characters.")
    return value


def _integer(left: dict[str, Any], name: str, default: int, *, least: int, most: int) -> int:
    value = left.pop(name, None)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise invalid(name, f"give a whole number in [{least}, {most}].")
    return value


def _fill(name: str, message: Message, values: Any) -> None:
    if values is None:
        return
    if not isinstance(values, dict):
        raise invalid(name, "give an object.")
    fill_from_json(message, values)


def _end(left: Mapping[str, Any]) -> None:
    for name in left:
        raise invalid(name[:80], "there is no such field here; leave it out.")
