"""Rows of a file of prompts: read one by one, so that the file may be longer than memory; a bad row fails alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stillhouse.client.core.errors import file_error, usage_error
from stillhouse.client.teacher.generate import as_ids
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tensors.layout import encode

Format = Literal["plain", "openai"]

MAX_LINE_BYTES = 64 << 20
MAX_SAMPLES = 4096
INPUTS = ("prompt", "messages", "token_ids")
"""Of these a plain row has one."""
SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens", "seed", "stop")
SETTINGS = (*SAMPLING, "num_samples", "adapter")
"""What a plain row may set for itself; every other field is the caller's, and comes back as it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How rows are written that do not say it themselves; None takes the contract's default."""

    temperature: float | None = None
    """0 is greedy. The default is 1."""
    top_p: float | None = None
    """The default is 1."""
    top_k: int | None = None
    """0 means all tokens, which is the default."""
    max_new_tokens: int | None = None
    """The default is 256; for rows of the OpenAI format it is that of their interface."""
    seed: int | None = None
    """Fixes the text of each (prompt, sample), however often a batch is interrupted."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample."""
    num_samples: int = 1
    """Samples of a row."""
    adapter: str = ""
    """Adapter for rows that name none; empty means the base model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A line of the input that is not blank."""

    number: int
    """Its place among them, from 0."""
    line_number: int
    """Its place in the file, from 1."""
    data: bytes
    """What it says."""
    digest: str
    """Tells it from other lines."""
    end: int
    """Offset of the byte behind it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What one line asks for, or why it asks for nothing."""

    line: Line
    """Where it stands."""
    id: Any = None
    """The caller's name for it, as it stands in the file."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The line's JSON object."""
    prompts: tuple[teacher_pb2.Prompt, ...] = ()
    """What is continued, each with its own sampling."""
    num_samples: int = 1
    """Samples of each prompt."""
    top_logprobs: int | None = None
    """Likeliest tokens to report at each position; None reports nothing."""
    interface: Literal["", "chat", "completions"] = ""
    """Which of OpenAI's interfaces it is written for."""
    error: StillhouseError | None = None
    """Why it cannot be asked for."""

    @property
    def num_answers(self) -> int:
        """Samples in all."""
        return 0 if self.error is not None else len(self.prompts) * self.num_samples


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of `path` that are not blank. Raises StillhouseError if it cannot be read."""
    number = end = 0
    try:
        with path.open("rb") as file:
            for line_number, data in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
                if len(data) > MAX_LINE_BYTES:
                    raise usage_error(
                        f"{path}:{line_number}: the line is longer than {MAX_LINE_BYTES} bytes. Shorten it."
                    )
                end += len(data)
                stripped = data.strip()
                if not stripped:
                    continue
                digest = hashlib.blake2b(stripped, digest_size=8).hexdigest()
                yield Line(number=number, line_number=line_number, data=stripped, digest=digest, end=end)
                number += 1
    except OSError as error:
        raise file_error("read", path, error) from error


def detect(path: Path) -> Format:
    """The format of a file, by its first row: OpenAI's has `custom_id` or `body`."""
    for line in read_lines(path):
        try:
            values = parse(line)
        except StillhouseError:
            return "plain"
        return "openai" if "custom_id" in values or {"url", "body"} <= values.keys() else "plain"
    return "plain"


def parse(line: Line) -> dict[str, Any]:
    """The JSON object of a line. Raises StillhouseError if it is none."""
    try:
        values = json.loads(line.data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise invalid(f"Line {line.line_number} is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise invalid(f"Line {line.line_number} is no JSON object.")
    return values


def plain_row(line: Line, sampling: Sampling) -> Row:
    """The row with `prompt`, `messages` or `token_ids`; see SETTINGS for what else it may say."""
    values: dict[str, Any] = {}
    name: Any = None
    try:
        values = parse(line)
        name = values.get("id", line.line_number)
        given = [each for each in INPUTS if values.get(each) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise invalid(
                f"Line {line.line_number}: a row has one of {', '.join(INPUTS)}; this one has {found}."
            )
        num_samples = whole(values, "num_samples", 1, MAX_SAMPLES)
        message = prompt_of(values[given[0]], given[0])
        message.adapter = _text(values, "adapter") or sampling.adapter
        message.sampling.CopyFrom(sampling_of(values, sampling))
    except StillhouseError as error:
        return Row(line=line, id=name, values=values, error=error)
    return Row(
        line=line,
        id=name,
        values=values,
        prompts=(message,),
        num_samples=sampling.num_samples if num_samples is None else num_samples,
    )


def prompt_of(value: Any, field_name: str) -> teacher_pb2.Prompt:
    """The prompt that `value` of a field is: text, a list of messages, or token ids. Raises StillhouseError."""
    try:
        match field_name:
            case "prompt":
                if not isinstance(value, str):
                    raise invalid(f"prompt is {_kind(value)}; it must be text.")
                return teacher_pb2.Prompt(text=value)
            case "messages":
                conversation = teacher_pb2.Conversation(messages=_messages(value))
                return teacher_pb2.Prompt(conversation=conversation)
            case _:
                if not isinstance(value, list) or not all(type(each) is int for each in value):
                    raise invalid(f"{field_name} must be a list of whole numbers.")
                return teacher_pb2.Prompt(token_ids=encode(as_ids(np.asarray(value, dtype=np.int64))))
    except UnicodeError as error:
        raise invalid(f"{field_name} has text that is not Unicode: {error}.") from error
    except OverflowError as error:
        raise invalid(f"{field_name} has a number that is no token id.") from error


def _messages(value: Any) -> list[teacher_pb2.Message]:
    if not isinstance(value, list) or not value:
        raise invalid("messages must be a list of at least one message.")
    messages = []
    for index, each in enumerate(value):
        if not isinstance(each, dict):
            raise invalid(f"messages[{index}] is {_kind(each)}; it must be an object.")
        for name in ("role", "content"):
            if not isinstance(each.get(name), str):
                raise invalid(f"messages[{index}].{name} is {_kind(each.get(name))}; it must be text.")
        messages.append(teacher_pb2.Message(role=each["role"], content=each["content"]))
    return messages


def sampling_of(values: Mapping[str, Any], common: Sampling) -> teacher_pb2.SamplingParams:
    """The sampling of a row: its own fields before the common ones. Raises StillhouseError for a wrong type.

    Ranges are the teacher's to check.
    """
    params = teacher_pb2.SamplingParams(
        temperature=common.temperature,
        top_p=common.top_p,
        top_k=common.top_k,
        max_new_tokens=common.max_new_tokens,
        seed=common.seed,
    )
    for name in ("temperature", "top_p"):
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise invalid(f"{name} is {_kind(value)}; it must be a number.")
        setattr(params, name, float(value))
    for name, low, high in (
        ("top_k", 0, 2**31 - 1),
        ("max_new_tokens", 1, 2**31 - 1),
        ("seed", -(2**63), 2**63 - 1),
    ):
        number = whole(values, name, low, high)
        if number is not None:
            setattr(params, name, number)
    params.stop.extend(stops(values.get("stop"), common.stop))
    return params


def stops(value: Any, common: Sequence[str]) -> Sequence[str]:
    """Stop strings: one, several, or the common ones for None. Raises StillhouseError for anything else."""
    if value is None:
        return common
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(each, str) and each for each in texts):
        raise invalid("stop must be text, or a list of texts, none of them empty.")
    return texts


def whole(values: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    """The whole number in [low, high] that a field holds, or None. Raises StillhouseError for anything else."""
    value = values.get(name)
    if value is None:
        return None
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        shown = value if isinstance(value, int | float) else _kind(value)
        raise invalid(f"{name} is {shown}; it must be a whole number in [{low}, {high}].")
    return value


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    if value is not None and not isinstance(value, str):
        raise invalid(f"{name} is {_kind(value)}; it must be text.")
    return value or ""


def _kind(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def invalid(sentence: str) -> StillhouseError:
    """What a row gets that makes no sense."""
    return StillhouseError(Reason.INVALID_REQUEST, sentence)
