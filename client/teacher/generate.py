"""Generation by a teacher: prompts in, pieces out as they grow, and finished samples gathered from them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stillhouse.client.core.errors import field_errors, usage_error
from stillhouse.client.teacher.connection import TeacherConnection
from stillhouse.protos.errors import Reason, StillhouseError, from_status
from stillhouse.protos.rows.conversation import OPTIONS, parse_turns
from stillhouse.protos.rows.wire import to_wire
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import Distributions, decode_distributions
from stillhouse.protos.tensors.layout import decode, encode

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Mapping[str, Any] | teacher_pb2.Prompt
"""Text, token ids, messages, or an object with `messages`, `tools` and `chat_template_kwargs`."""

SPARE_PIECES = 64
"""Pieces of a sample without a token of their own, such as held-back text, beyond one for each token."""
_FINISH = {
    teacher_pb2.SampleChunk.FINISH_REASON_UNSPECIFIED: "",
    teacher_pb2.SampleChunk.FINISH_REASON_STOP: "stop",
    teacher_pb2.SampleChunk.FINISH_REASON_LENGTH: "length",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """The next piece of one sample."""

    prompt_index: int
    """Index of its prompt, counted from 0 over all prompts given."""
    sample_index: int
    """Its place among that prompt's samples."""
    text: str = ""
    """The new text."""
    token_ids: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    """The new tokens, [T]."""
    sampling_logprobs: NDArray[np.float32] | None = None
    """Log-probability of each new token where it was sampled, after temperature, top-p and top-k, [T]."""
    distributions: Distributions | None = None
    """The teacher's distribution at each new token, at temperature 1, if it was asked for."""
    finish: str = ""
    """"stop" or "length" on the last piece, else empty, also after an error."""
    prompt_tokens: int = 0
    """Tokens of the prompt; set on the first piece."""
    prompt_token_ids: NDArray[np.int32] | None = None
    """The prompt, [P], on the first piece, if requested."""
    student_prompt_token_ids: NDArray[np.int32] | None = None
    """The student's own prompt, [S], beside it, if it has one."""
    error: StillhouseError | None = None
    """The reason for which this sample, and only this one, failed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion(Piece):
    """One finished sample: all its pieces together; after an error, those that came before it."""


@dataclass(kw_only=True, slots=True)
class Gathering:
    """Pieces of unfinished samples."""

    _pieces: dict[tuple[int, int], list[Piece]] = field(default_factory=dict)

    def add(self, piece: Piece) -> Completion | None:
        """Adds a piece; returns the completion if it is the sample's last."""
        key = piece.prompt_index, piece.sample_index
        parts = self._pieces.setdefault(key, [])
        parts.append(piece)
        if not piece.finish and piece.error is None:
            return None
        del self._pieces[key]
        logprobs = [part.sampling_logprobs for part in parts if part.sampling_logprobs is not None]
        distributions = [part.distributions for part in parts if part.distributions is not None]
        return Completion(
            prompt_index=piece.prompt_index,
            sample_index=piece.sample_index,
            text="".join(part.text for part in parts),
            token_ids=np.concatenate([part.token_ids for part in parts]),
            sampling_logprobs=np.concatenate(logprobs) if logprobs else None,
            distributions=Distributions.concat(distributions) if distributions else None,
            finish=piece.finish,
            prompt_tokens=max(part.prompt_tokens for part in parts),
            prompt_token_ids=parts[0].prompt_token_ids,
            student_prompt_token_ids=parts[0].student_prompt_token_ids,
            error=piece.error,
        )


def as_prompt(prompt: Prompt, adapter: str, date: str = "") -> teacher_pb2.Prompt:
    """Converts text, token ids or messages, whose template is told `date`, to a message.

    Raises StillhouseError for anything else.
    """
    message = teacher_pb2.Prompt(adapter=adapter)
    if isinstance(prompt, teacher_pb2.Prompt):
        message.MergeFrom(prompt)
    elif isinstance(prompt, str):
        message.text = prompt
    elif isinstance(prompt, Mapping):
        unknown = sorted(map(str, prompt.keys() - {"messages", "tools", OPTIONS}))
        if unknown:
            raise usage_error(
                f'a conversation has no field "{unknown[0]}"; its fields are messages, tools and {OPTIONS}.'
            )
        with field_errors():
            message.conversation.CopyFrom(
                to_wire(parse_turns(prompt.get("messages"), prompt.get("tools"), prompt.get(OPTIONS)))
            )
    elif len(prompt) and all(isinstance(turn, Mapping) for turn in prompt):
        with field_errors():
            message.conversation.CopyFrom(
                to_wire(parse_turns([dict(turn) for turn in prompt if isinstance(turn, Mapping)]))
            )
    else:
        message.token_ids.CopyFrom(encode(as_ids(prompt)))
    if date and message.HasField("conversation"):
        message.conversation.date = date
    return message


def as_ids(ids: object) -> NDArray[np.int32]:
    """Converts token ids to int32 [T]. Raises StillhouseError for anything but integers in range."""
    try:
        array = np.asarray(ids if isinstance(ids, Sequence | np.ndarray) else list(ids))  # type: ignore[call-overload]
    except (TypeError, ValueError) as error:
        raise usage_error(f"token ids are a list of whole numbers, not {ids!r:.60}.") from error
    if array.size == 0:
        array = array.astype(np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu" or (array.size and abs(int(array.max())) >= 2**31):
        raise usage_error(f"token ids are a list of whole numbers in [0, 2^31), not {ids!r:.60}.")
    return array.astype(np.int32)


def pieces(
    teacher: TeacherConnection, prompts: Iterable[teacher_pb2.Prompt], template: teacher_pb2.GenerateRequest
) -> Iterator[Piece]:
    """Streams the pieces of `prompts`, requested with `template`, at most the teacher's max_prompts at a time."""
    most = max(1, teacher.limits.max_prompts)
    most_samples = max(1, template.num_samples)
    offset = 0
    for batch in _batched(prompts, most):
        request = teacher_pb2.GenerateRequest(prompts=batch)
        request.MergeFrom(template)
        num_pieces: Counter[tuple[int, int]] = Counter()
        num_tokens: Counter[tuple[int, int]] = Counter()
        for response in teacher.stream(teacher.stub.Generate, request):
            for chunk in response.chunks:
                if not (0 <= chunk.prompt_index < len(batch) and 0 <= chunk.sample_index < most_samples):
                    raise StillhouseError(
                        Reason.TENSOR_INVALID,
                        f"the teacher sent sample {chunk.sample_index} of prompt {chunk.prompt_index}; requested were "
                        f"{most_samples} of {len(batch)} prompts.",
                    )
                key = chunk.prompt_index, chunk.sample_index
                piece = piece_of(chunk, teacher.limits, template)
                num_pieces[key] += 1
                num_tokens[key] += len(piece.token_ids)
                most_tokens = teacher.limits.max_sequence_tokens
                if num_tokens[key] > most_tokens or num_pieces[key] > 2 * most_tokens + SPARE_PIECES:
                    raise StillhouseError(
                        Reason.TENSOR_INVALID,
                        f"the teacher sent {num_pieces[key]} pieces with {num_tokens[key]} tokens of one sample, and its "
                        f"sequences have at most {most_tokens}.",
                    )
                yield replace(piece, prompt_index=offset + chunk.prompt_index)
        offset += len(batch)


def _batched(prompts: Iterable[teacher_pb2.Prompt], most: int) -> Iterator[tuple[teacher_pb2.Prompt, ...]]:
    iterator = iter(prompts)
    while batch := tuple(itertools.islice(iterator, most)):
        yield batch


def piece_of(
    chunk: teacher_pb2.SampleChunk,
    limits: teacher_pb2.GetTeacherInfoResponse,
    template: teacher_pb2.GenerateRequest,
) -> Piece:
    """Decodes a chunk and checks it against the teacher's limits and the request. Raises StillhouseError."""
    most = limits.max_sequence_tokens
    distributions = None
    if chunk.HasField("distributions"):
        distributions = decode_distributions(
            chunk.distributions,
            vocab_size=limits.vocab_size,
            max_rows=most,
            max_top_k=template.distributions.top_k,
        )
    sampling_logprobs = None
    if chunk.HasField("sampling_logprobs"):
        sampling_logprobs = _array(
            chunk.sampling_logprobs, "sampling_logprobs", Tensor.DATA_TYPE_FLOAT32, most
        )
    prompts = {}
    for name in ("prompt_token_ids", "student_prompt_token_ids"):
        if chunk.HasField(name):
            prompts[name] = _array(getattr(chunk, name), name, Tensor.DATA_TYPE_INT32, most)
    token_ids = np.zeros(0, np.int32)
    if chunk.HasField("token_ids"):
        token_ids = _array(chunk.token_ids, "token_ids", Tensor.DATA_TYPE_INT32, most)
    return Piece(
        prompt_index=chunk.prompt_index,
        sample_index=chunk.sample_index,
        text=chunk.text,
        token_ids=token_ids,
        sampling_logprobs=sampling_logprobs,
        distributions=distributions,
        finish=_FINISH.get(chunk.finish_reason, "stop"),
        prompt_tokens=chunk.prompt_tokens,
        **prompts,
        error=from_status(chunk.error) if chunk.HasField("error") else None,
    )


def _array(tensor: Tensor, name: str, dtype: Tensor.DataType.ValueType, most: int) -> NDArray[Any]:
    return decode(tensor, field=f"chunk.{name}", dtypes=(dtype,), shape=(None,), max_elements=most)
