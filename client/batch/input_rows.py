"""Reads rows of prompts one by one, so that a file may exceed memory; an invalid row fails alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from stillhouse.client.core.errors import field_errors, file_errors
from stillhouse.client.teacher.generate import as_ids
from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.conversation import OPTIONS, parse_tools, parse_turns, with_system
from stillhouse.protos.rows.field_error import FieldError, kind_of, require_unicode, shown
from stillhouse.protos.rows.files import read_file
from stillhouse.protos.rows.known_fields import (
    LABELS,
    PROMPTS,
    SETTINGS,
    STUDENT_PROMPT,
    SYNONYMS,
    TRAINING,
    ExtraFields,
    check_fields,
    unknown,
    without_effect,
)
from stillhouse.protos.rows.reading.json_rows import as_json
from stillhouse.protos.rows.reading.open_file import bounded_lines, opened
from stillhouse.protos.rows.reading.strict_json import StrictJson, why_not_json
from stillhouse.protos.rows.row_forms import known_fields
from stillhouse.protos.rows.training_row import context_of
from stillhouse.protos.rows.wire import to_wire
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tensors.layout import encode

Format = Literal["plain", "openai"]

MAX_SAMPLES = 4096
_KNOWN = {*TRAINING, *SETTINGS, *LABELS, STUDENT_PROMPT}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Default sampling of rows; None takes the contract's default."""

    temperature: float | None = None
    """0 is greedy. The default is 1."""
    top_p: float | None = None
    """The default is 1."""
    top_k: int | None = None
    """0 means all tokens, which is the default."""
    max_new_tokens: int | None = None
    """The default is 256; for rows of the OpenAI format it is that of their interface."""
    seed: int | None = None
    """Fixes the completion of each (prompt, sample), however often a batch is interrupted."""
    stop: tuple[str, ...] = ()
    """Texts that end a sample."""
    num_samples: int = 1
    """Samples per prompt."""
    adapter: str = ""
    """Adapter of rows that name none; empty means the base model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputLine:
    """A non-blank line of the input."""

    number: int
    """Index among the non-blank lines, from 0."""
    line_number: int
    """Line number in the file, from 1."""
    data: bytes
    """Content, stripped."""
    digest: str
    """Digest of the content."""
    end: int
    """Offset of the byte after it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRow:
    """A parsed input row: its prompts, or the error that makes it invalid."""

    line: InputLine
    """Source line."""
    id: Any = None
    """The caller's id, as in the file."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The line's JSON object."""
    prompts: tuple[teacher_pb2.Prompt, ...] = ()
    """Prompts, each with its own sampling."""
    num_samples: int = 1
    """Samples of each prompt."""
    content: tuple[Mapping[str, Any] | None, ...] = ()
    """For each prompt its fields in a training row: `messages` or `prompt`, and `tools`; None for token ids."""
    top_logprobs: int | None = None
    """Top-k tokens to report at each position; None reports nothing."""
    interface: Literal["", "chat", "completions"] = ""
    """OpenAI interface of the row; empty for plain rows."""
    error: StillhouseError | None = None
    """Error of an invalid row."""

    @property
    def num_completions(self) -> int:
        """Number of samples of all prompts."""
        return 0 if self.error is not None else len(self.prompts) * self.num_samples


def read_lines(path: Path) -> Iterator[InputLine]:
    """Yields the non-blank lines of `path`, or its rows as JSON lines. Raises StillhouseError if it cannot be read."""
    number = end = 0
    with file_errors("read", path):
        for line_number, data in _numbered_lines(path):
            end += len(data)
            stripped = data.strip()
            if not stripped:
                continue
            digest = hashlib.blake2b(stripped, digest_size=8).hexdigest()
            yield InputLine(number=number, line_number=line_number, data=stripped, digest=digest, end=end)
            number += 1


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    rows = read_file(path)
    if rows.container == "JSONL":
        with opened(path) as file:
            yield from bounded_lines(path, file)
        return
    for number, values in rows.raw():
        yield number, as_json(path, number, values)


def count_rows(path: Path) -> int:
    """Counts the non-blank lines of `path`. Raises StillhouseError if it cannot be read."""
    with file_errors("read", path):
        return sum(1 for _, line in _numbered_lines(path) if not line.isspace())


def detect_format(path: Path) -> Format:
    """Detects the format by the first row: OpenAI's has `custom_id` or `body`."""
    for line in read_lines(path):
        try:
            values = parse_object(line)
        except StillhouseError:
            return "plain"
        return "openai" if "custom_id" in values or {"url", "body"} <= values.keys() else "plain"
    return "plain"


def parse_object(line: InputLine) -> dict[str, Any]:
    """Parses a line as a JSON object. Raises StillhouseError if it is not one."""
    decoder = StrictJson()
    try:
        values = decoder.parse(line.data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise invalid(
            f"Line {line.line_number} {why_not_json(error, 'write one JSON object per line')}"
        ) from error
    if not isinstance(values, dict):
        raise invalid(f"Line {line.line_number} is not a JSON object.")
    if decoder.fault is not None:
        raise invalid(f"Line {line.line_number}, field {decoder.fault.field}: {decoder.fault.problem}")
    return values


def plain_row(
    line: InputLine, sampling: Sampling, *, chat: bool = False, extra_fields: ExtraFields = "keep"
) -> PromptRow:
    """Parses a row with `prompt`, `messages` or `token_ids`, and optionally CONTEXT and SETTINGS.

    `chat` makes a user's turn of a prompt of text; `system` and `tools` do so as well.
    """
    values: dict[str, Any] = {}
    name: Any = None
    try:
        values = parse_object(line)
        name = values.get("id", line.line_number)
        with field_errors(f"Line {line.line_number}: "):
            values = dict(known_fields(values))
        given = [each for each in PROMPTS if values.get(each) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none of them"
            raise invalid(
                f"Line {line.line_number}: a row has one of {', '.join(PROMPTS)}; this one has {found}."
            )
        with field_errors():
            no_effect = without_effect(has_tools=bool(parse_tools(values.get("tools"))))
            check_fields(values, known=_KNOWN, no_effect=no_effect, extra=extra_fields)
            settings = _with_synonyms(values)
            message, content = _plain_prompt(values, given[0], chat=chat, extra_fields=extra_fields)
            if values.get(STUDENT_PROMPT) is not None:
                content = _add_student_prompt(message, values)
        num_samples = parse_integer(settings, "num_samples", 1, MAX_SAMPLES)
        message.adapter = text_field(values, "adapter") or sampling.adapter
        message.sampling.CopyFrom(parse_sampling(settings, sampling))
    except StillhouseError as error:
        return PromptRow(line=line, id=name, values=values, error=error)
    return PromptRow(
        line=line,
        id=name,
        values=values,
        prompts=(message,),
        content=(content,),
        num_samples=sampling.num_samples if num_samples is None else num_samples,
    )


def _plain_prompt(
    values: Mapping[str, Any], field_name: str, *, chat: bool, extra_fields: ExtraFields
) -> tuple[teacher_pb2.Prompt, Mapping[str, Any] | None]:
    """Returns the prompt of a row, and its fields in a training row. Raises FieldError and StillhouseError."""
    value, system = values[field_name], values.get("system")
    is_text = field_name == "prompt" and isinstance(value, str)
    if field_name == "token_ids" or (is_text and not (chat or context_of(values))):
        if name := context_of(values):
            raise FieldError(name, "has no effect on token ids. Give messages or a prompt.")
        return parse_prompt(value, field_name), None if field_name == "token_ids" else {"prompt": value}
    if field_name == "prompt" and not is_text and not _is_messages(value):
        raise FieldError("prompt", f"is {kind_of(value)}; it must be a string, or an array of messages.")
    messages = [{"role": "user", "content": value}] if is_text else value
    content = {"messages" if is_text and chat else field_name: messages if chat or not is_text else value}
    tools, options = values.get("tools"), values.get(OPTIONS)
    turns = parse_turns(messages, tools, options, name=field_name)
    if system:
        turns = parse_turns(with_system(messages, system), tools, options)
    if turns.extra and extra_fields == "refuse":
        raise unknown(turns.extra[0])
    return teacher_pb2.Prompt(conversation=to_wire(turns)), content


def _add_student_prompt(message: teacher_pb2.Prompt, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Adds the prompt that the student reads; returns its fields in a training row. Raises FieldError.

    Text is a user's turn where the teacher's prompt is a conversation.
    """
    value, is_text = values[STUDENT_PROMPT], isinstance(values[STUDENT_PROMPT], str)
    if is_text and message.WhichOneof("input") != "conversation":
        message.student_text = require_unicode(value, STUDENT_PROMPT)
        return {"prompt": value}
    messages = [{"role": "user", "content": value}] if is_text else value
    turns = parse_turns(messages, values.get("tools"), name=STUDENT_PROMPT)
    message.student_conversation.CopyFrom(to_wire(turns))
    return {"messages" if is_text else "prompt": messages}


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _with_synonyms(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the fields with OpenAI's names of settings replaced. Raises FieldError if two names of one differ."""
    settings = dict(values)
    for name, setting in SYNONYMS.items():
        number = parse_integer(values, name, 1, MAX_SAMPLES if setting == "num_samples" else 2**31 - 1)
        if number is None:
            continue
        if settings.get(setting) not in (None, number):
            raise FieldError(name, f"differs from {setting}. Give one of them.")
        settings[setting] = number
    return settings


def parse_prompt(value: Any, field_name: str) -> teacher_pb2.Prompt:
    """Parses text or token ids as a prompt. Raises FieldError and StillhouseError."""
    try:
        if field_name == "prompt":
            return teacher_pb2.Prompt(text=_string(value, field_name))
        if not isinstance(value, list):
            raise FieldError(field_name, f"is {kind_of(value)}; it must be an array of whole numbers.")
        for index, each in enumerate(value):
            if type(each) is not int:
                raise FieldError(f"{field_name}[{index}]", f"is {kind_of(each)}; it must be a whole number.")
        return teacher_pb2.Prompt(token_ids=encode(as_ids(np.asarray(value, dtype=np.int64))))
    except OverflowError as error:
        raise invalid(f"{field_name} has a number that is not a token id.") from error


def parse_sampling(values: Mapping[str, Any], common: Sampling) -> teacher_pb2.SamplingParams:
    """Merges a row's sampling over the common one. Raises StillhouseError for a wrong type.

    The teacher checks ranges.
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
            raise invalid(f"{name} is {kind_of(value)}; it must be a number.")
        setattr(params, name, float(value))
    for name, low, high in (
        ("top_k", 0, 2**31 - 1),
        ("max_new_tokens", 1, 2**31 - 1),
        ("seed", -(2**63), 2**63 - 1),
    ):
        number = parse_integer(values, name, low, high)
        if number is not None:
            setattr(params, name, number)
    params.stop.extend(parse_stop(values.get("stop"), common.stop))
    return params


def parse_stop(value: Any, common: Sequence[str]) -> Sequence[str]:
    """Returns stop strings: one, several, or the common ones for None. Raises StillhouseError for anything else."""
    if value is None:
        return common
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list):
        raise invalid(f"stop is {kind_of(value)}; it must be a string, or an array of strings.")
    with field_errors():
        stops = [_string(each, f"stop[{index}]") for index, each in enumerate(texts)]
    if not all(stops):
        raise invalid("stop has an empty string, which every text ends with. Remove it.")
    return stops


def parse_integer(values: Mapping[str, Any], name: str, low: int, high: int) -> int | None:
    """Returns the integer in [low, high] of a field, or None if it is absent. Raises StillhouseError for anything else."""
    value = values.get(name)
    if value is None:
        return None
    if type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        given = shown(value) if isinstance(value, int | float) else kind_of(value)
        raise invalid(f"{name} is {given}; it must be a whole number in [{low}, {high}].")
    return value


def text_field(values: Mapping[str, Any], name: str) -> str:
    """Returns a field of text, empty if it is absent. Raises StillhouseError."""
    value = values.get(name)
    with field_errors():
        return "" if value is None else _string(value, name)


def _string(value: Any, field_name: str) -> str:
    if not isinstance(value, str):
        raise FieldError(field_name, f"is {kind_of(value)}; it must be a string.")
    return require_unicode(value, field_name)


def invalid(sentence: str) -> StillhouseError:
    """Returns the error of an invalid row."""
    return StillhouseError(Reason.INVALID_REQUEST, sentence)
