"""Calls of the contract behind one request: prompts read, scored and continued, as its caller."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stillhouse.client.teacher.generate import Piece, piece_of
from stillhouse.client.web.api.messages import invalid
from stillhouse.client.web.security.callers import Caller
from stillhouse.client.web.teachers.served import Served
from stillhouse.protos.errors import Reason, StillhouseError, from_status
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import Distributions, decode_distributions
from stillhouse.protos.tensors.layout import decode, encode

MAX_VALUES = 1_000_000
"""Log-probabilities of one answer."""
Ids = NDArray[np.int32]


@dataclass(kw_only=True, slots=True)
class Room:
    """Values that one answer may still hold."""

    left: int = MAX_VALUES

    def take(self, num_tokens: int, logprobs: int | None) -> None:
        """Counts tokens. Raises StillhouseError(MESSAGE_TOO_LARGE) for more than an answer holds."""
        self.left -= num_tokens * (1 if logprobs is None else 1 + logprobs)
        if self.left < 0:
            raise StillhouseError(
                Reason.MESSAGE_TOO_LARGE,
                f"The answer has more than {MAX_VALUES} tokens and log-probabilities. Send fewer prompts at once, or lower "
                "n, max_tokens or logprobs.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherCalls:
    """Calls to the teacher of one model as one caller."""

    caller: Caller
    model: Served

    async def prompt_ids(self, prompts: Sequence[teacher_pb2.Prompt], field: str = "prompt") -> list[Ids]:
        """The token ids of prompts; of text as the teacher reads it, for which it writes one token.

        Raises StillhouseError(INVALID_REQUEST) for an id outside the vocabulary, which names `field`, and those of the call.
        """
        found = {
            at: decode(prompt.token_ids, field="prompt", dtypes=(Tensor.DATA_TYPE_INT32,), shape=(None,))
            for at, prompt in enumerate(prompts)
            if prompt.HasField("token_ids")
        }
        texts = [at for at in range(len(prompts)) if at not in found]
        if texts:
            request = teacher_pb2.GenerateRequest(
                prompts=[prompts[at] for at in texts],
                sampling=teacher_pb2.SamplingParams(max_new_tokens=1, temperature=0),
                prompt_token_ids=True,
                whole_samples=True,
            )
            async with aclosing(self.pieces(request)) as pieces:
                async for piece in pieces:
                    if piece.prompt_token_ids is not None:
                        found[texts[piece.prompt_index]] = piece.prompt_token_ids
        if len(found) < len(prompts):
            raise _wrong(f"the ids of {len(found)} of {len(prompts)} prompts")
        size = self.model.info.vocab_size
        for ids in found.values():
            if not (ids.min(initial=0) >= 0 and ids.max(initial=0) < size):
                raise invalid(field, f"a token id is outside [0, {size}), the vocabulary of the model.")
        return [found[at] for at in range(len(prompts))]

    async def score(self, sequences: Sequence[Ids], top_k: int) -> list[Distributions | None]:
        """The distributions of each sequence from its second token on; None for a single token."""
        long = {at: ids for at, ids in enumerate(sequences) if len(ids) > 1}
        parts: dict[int, list[Distributions]] = {at: [] for at in long}
        if not long:
            return [None] * len(sequences)
        config = teacher_pb2.DistributionConfig(top_k=top_k, logprob_dtype=Tensor.DATA_TYPE_FLOAT32)
        requests = [teacher_pb2.ScoreRequest(config=config)] + [
            teacher_pb2.ScoreRequest(
                sequence=teacher_pb2.ScoreSequence(
                    sequence_id=at, token_ids=encode(ids), start=1, adapter=self.model.adapter
                )
            )
            for at, ids in long.items()
        ]
        async with aclosing(self.caller.stream(self.model.service, "Score", requests)) as responses:
            async for response in responses:
                for result in response.results:
                    if result.HasField("error"):
                        raise from_status(result.error)
                    at = result.sequence_id
                    if at not in parts:
                        raise _wrong(f"a result of sequence {at}")
                    rows = decode_distributions(
                        result.distributions,
                        vocab_size=self.model.info.vocab_size,
                        max_rows=len(long[at]),
                        max_top_k=top_k,
                    )
                    parts[at].append(rows)
        whole = {at: Distributions.concat(each) for at, each in parts.items()}
        for at, rows in whole.items():
            if rows.start != 1 or rows.num_rows != len(long[at]) - 1:
                raise _wrong(f"{rows.num_rows} rows for a sequence of {len(long[at])} tokens")
        return [whole.get(at) for at in range(len(sequences))]

    async def pieces(self, request: teacher_pb2.GenerateRequest) -> AsyncGenerator[Piece, None]:
        """The pieces of the samples that `request` asks for. Raises StillhouseError, also for one sample's error."""
        for prompt in request.prompts:
            prompt.adapter = self.model.adapter
        num_prompts, n = len(request.prompts), max(1, request.num_samples)
        async with aclosing(self.caller.stream(self.model.service, "Generate", request)) as responses:
            async for response in responses:
                for chunk in response.chunks:
                    if not (0 <= chunk.prompt_index < num_prompts and 0 <= chunk.sample_index < n):
                        raise _wrong(f"sample {chunk.sample_index} of prompt {chunk.prompt_index}")
                    piece = piece_of(chunk, self.model.info, request)
                    if piece.error is not None:
                        raise piece.error
                    _check_rows(piece, request)
                    yield piece


def _check_rows(piece: Piece, request: teacher_pb2.GenerateRequest) -> None:
    if not request.HasField("distributions") or not len(piece.token_ids):
        return
    num_rows = 0 if piece.distributions is None else piece.distributions.num_rows
    if num_rows != len(piece.token_ids):
        raise _wrong(f"{num_rows} rows for {len(piece.token_ids)} tokens")


def _wrong(what: str) -> StillhouseError:
    return StillhouseError(
        Reason.TENSOR_INVALID, f"The teacher sent {what}, which nobody requested. Check its version."
    )
