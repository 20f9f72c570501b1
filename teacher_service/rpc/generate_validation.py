"""Validation of a Generate request: prompts, sampling parameters, and the seed of every sample."""

from __future__ import annotations

import hashlib
import math
from datetime import date, datetime

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.rows.conversation import Turns
from stillhouse.protos.rows.field_error import FieldError, shown
from stillhouse.protos.rows.wire import from_wire
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.teacher_service.engine import EngineInfo, Int32Array
from stillhouse.teacher_service.models.tokenizer import TextCodec
from stillhouse.teacher_service.rpc.score_validation import (
    check_length,
    check_tokens,
    invalid_request,
    require_text,
)
from stillhouse.teacher_service.rpc.service_state import ServiceState

MAX_SAMPLES_PER_PROMPT = 4096
MAX_STOP_STRINGS = 64
MAX_STOP_CHARS = 1024
MAX_TEMPERATURE = 1000.0
DEFAULT_NEW_TOKENS = 256


def check_call(request: teacher_pb2.GenerateRequest, serving: ServiceState) -> None:
    """Raises `StillhouseError` with INVALID_REQUEST for an invalid call, CAPABILITY for one to a classifier."""
    require_text(serving.info)
    if not request.prompts:
        raise invalid_request("The request has no prompts. Send at least one.")
    if len(request.prompts) > serving.config.max_prompts:
        raise invalid_request(
            f"The request has {len(request.prompts)} prompts; this teacher takes {serving.config.max_prompts} in one call. "
            "Send several calls, or start the teacher with a larger --max-prompts."
        )
    if not 0 <= request.num_samples <= MAX_SAMPLES_PER_PROMPT:
        raise invalid_request(
            f"num_samples is {request.num_samples}. Give a number in [1, {MAX_SAMPLES_PER_PROMPT}], or 0 for 1."
        )
    if request.part_tokens < 0:
        raise invalid_request(
            f"part_tokens is {request.part_tokens}. Give a number of at least 1, or 0 for one piece."
        )
    check_sampling(request.sampling, teacher_pb2.SamplingParams())
    for prompt in request.prompts:
        check_samples(prompt, request.num_samples)


def check_samples(prompt: teacher_pb2.Prompt, num_samples: int) -> tuple[int, ...]:
    """Indices of the requested samples of a prompt. Raises `StillhouseError` with INVALID_REQUEST."""
    if not prompt.sample_indices:
        return tuple(range(max(1, num_samples)))
    indices = tuple(prompt.sample_indices)
    if not (
        min(indices) >= 0 and max(indices) < MAX_SAMPLES_PER_PROMPT and len(set(indices)) == len(indices)
    ):
        raise invalid_request(
            f"sample_indices has {len(indices)} numbers from {min(indices)} to {max(indices)}. Give each once, in "
            f"[0, {MAX_SAMPLES_PER_PROMPT - 1}]."
        )
    return indices


def check_sampling(
    common: teacher_pb2.SamplingParams, own: teacher_pb2.SamplingParams
) -> teacher_pb2.SamplingParams:
    """Merges and validates sampling parameters: fields set in `own` override those in `common`, and these the defaults."""
    sampling = teacher_pb2.SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=DEFAULT_NEW_TOKENS)
    sampling.MergeFrom(common)
    if own.stop:
        del sampling.stop[:]
    sampling.MergeFrom(own)
    sampling.stop[:] = dict.fromkeys(sampling.stop)
    if not (math.isfinite(sampling.temperature) and 0 <= sampling.temperature <= MAX_TEMPERATURE):
        raise invalid_request(
            f"temperature is {sampling.temperature}. Give a number in [0, {MAX_TEMPERATURE:g}]; 0 is greedy."
        )
    if not 0 < sampling.top_p <= 1:
        raise invalid_request(f"top_p is {sampling.top_p}. Give a number above 0, at most 1.")
    if sampling.top_k < 0:
        raise invalid_request(f"top_k is {sampling.top_k}. Give a number above 0, or 0 for all tokens.")
    if sampling.max_new_tokens < 1:
        raise invalid_request(f"max_new_tokens is {sampling.max_new_tokens}. Give at least 1.")
    if len(sampling.stop) > MAX_STOP_STRINGS:
        raise invalid_request(
            f"There are {len(sampling.stop)} stop strings; at most {MAX_STOP_STRINGS} are taken."
        )
    for stop in sampling.stop:
        if not 0 < len(stop) <= MAX_STOP_CHARS:
            raise invalid_request(f"A stop string has {len(stop)} characters. Give 1 to {MAX_STOP_CHARS}.")
    return sampling


def check_prompt(prompt: teacher_pb2.Prompt, codec: TextCodec, info: EngineInfo) -> Int32Array:
    """Validated ids of a prompt, with room for at least one new token. Runs the tokenizer: call it in a thread."""
    longest = info.max_sequence_tokens - 1
    match prompt.WhichOneof("input"):
        case "token_ids":
            return check_tokens(prompt.token_ids, info, longest=longest)
        case "text":
            ids = codec.encode(prompt.text)
        case "conversation":
            turns = conversation_of(prompt)
            assert turns is not None
            ids = codec.render(turns, today=_day(prompt.conversation.date))
        case _:
            raise invalid_request("A prompt needs token_ids, text or a conversation, and this one has none.")
    check_length(len(ids), longest)
    return ids


def conversation_of(prompt: teacher_pb2.Prompt) -> Turns | None:
    """Validated conversation of a prompt; None for text and token ids. Raises `StillhouseError` with EMPTY_SEQUENCE, INVALID_REQUEST."""
    if prompt.WhichOneof("input") != "conversation":
        return None
    if not prompt.conversation.messages:
        raise StillhouseError(Reason.EMPTY_SEQUENCE, "The conversation has no messages. Send at least one.")
    try:
        return from_wire(prompt.conversation)
    except FieldError as error:
        raise invalid_request(str(error)) from error


def check_student_prompt(prompt: teacher_pb2.Prompt, codec: TextCodec, info: EngineInfo) -> Int32Array | None:
    """Validated ids of the prompt that a student reads in the place of the teacher's; None if it reads the same."""
    kind = prompt.WhichOneof("student")
    if kind is None:
        return None
    own = teacher_pb2.Prompt()
    if kind == "student_text":
        own.text = prompt.student_text
    else:
        own.conversation.CopyFrom(prompt.student_conversation)
    try:
        return check_prompt(own, codec, info)
    except StillhouseError as error:
        raise StillhouseError(
            error.reason, f"The student's prompt: {error.message}", metadata=error.metadata
        ) from error


def _day(text: str) -> date | None:
    if not text:
        return None
    try:
        return datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError as error:
        raise invalid_request(
            f"date is {shown(text)}; it must be a day such as 2025-01-31, or empty."
        ) from error


def seed_of(sampling: teacher_pb2.SamplingParams, prompt_ids: Int32Array, sample_index: int) -> int | None:
    """Derives the seed of one sample, in [0, 2^63), from the call's seed, the prompt and the sample's index.

    The prompt's position in the call is excluded, so that a prompt has the same completions in any batch.
    """
    if not sampling.HasField("seed"):
        return None
    hashed = hashlib.blake2b(digest_size=8)
    for number in (sampling.seed, sample_index):
        hashed.update(number.to_bytes(8, "little", signed=True))
    hashed.update(prompt_ids.astype("<i4").tobytes())
    return int.from_bytes(hashed.digest(), "little") >> 1
