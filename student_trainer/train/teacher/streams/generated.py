"""Lets a teacher generate ahead of the student: prompts go out and finished samples with their distributions come in.

A sample depends on its seed, its prompt and its index alone, so that asking again gives the same with an engine that
computes alike. The caller bounds what is in flight.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError, from_status
from stillhouse.protos.rpc.pool.service_pool import Call
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    DistributionConfig,
    GenerateRequest,
    Prompt,
    SampleChunk,
    SamplingParams,
)
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import Distributions, decode, decode_distributions, encode
from stillhouse.student_trainer.config.schema import RolloutConfig
from stillhouse.student_trainer.train.teacher.endpoints import Endpoint
from stillhouse.student_trainer.train.teacher.streams.teacher_stream import TeacherStream
from stillhouse.student_trainer.train.teacher.teacher import TeacherClient

NUM_CALLS = 2
"""Generate calls to a service side by side: while one writes its last samples, the next has begun."""
_ID_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherSample:
    """One finished sample."""

    token_ids: NDArray[np.int32]
    """[n]: the completion's tokens, the end token included if it was generated."""
    distributions: Distributions | None
    """Distributions of its tokens, counted from the first token of the prompt; None if none were asked for."""
    finished: bool
    """True if it ended with a stop token, not at its limit."""

    def behind(self, num_prompt: int) -> Distributions | None:
        """Its distributions, counted from the first token of a prompt of `num_prompt` tokens, such as the student's."""
        return None if self.distributions is None else replace(self.distributions, start=num_prompt)


@dataclass(eq=False, kw_only=True, slots=True)
class _Prompt:
    token_ids: NDArray[np.int32]
    seed: int
    max_new_tokens: int
    place: str
    samples: dict[int, TeacherSample] = field(default_factory=dict)
    """Finished samples by index; they outlast a break."""


class TextStream(TeacherStream[_Prompt, list[TeacherSample]]):
    """A teacher's samples for prompts, by the ids that the caller gives them: a few calls at once to each service."""

    def __init__(
        self, teacher: TeacherClient, generation: RolloutConfig, distributions: DistributionConfig | None
    ) -> None:
        """Starts the threads; `teacher` has been reached once."""
        self._generation = generation
        self._distributions = distributions
        super().__init__(teacher, name="text-stream", cost_of=self._cost_of, max_calls=NUM_CALLS)

    def submit(
        self, prompt_id: int, token_ids: NDArray[np.int32], *, seed: int, max_new_tokens: int, place: str
    ) -> None:
        """Asks for `samples_per_prompt` completions of a prompt; `place` is named in errors."""
        prompt = _Prompt(token_ids=token_ids, seed=seed, max_new_tokens=max_new_tokens, place=place)
        self._pool.put({prompt_id: prompt})

    def _cost_of(self, prompt: _Prompt) -> int:
        return len(prompt.token_ids) + prompt.max_new_tokens * self._generation.samples_per_prompt

    @property
    def num_asked(self) -> int:
        """Samples asked for, repetitions included."""
        return super().num_asked * self._generation.samples_per_prompt

    def _serve(self, endpoint: Endpoint, call: Call[_Prompt, list[TeacherSample]]) -> None:
        """Makes one call for all prompts that wait, up to the service's limit."""
        places = iter(range(self._teacher.info.max_prompts or sys.maxsize))
        prompts = call.take(lambda _: next(places, None) is not None)
        if not prompts:
            return
        ids = list(prompts)
        parts: dict[tuple[int, int], list[SampleChunk]] = {}
        with endpoint.errors():
            stream = endpoint.stub().Generate(self._request(list(prompts.values())))
            call.on_cancel(stream.cancel)
            try:
                for response in stream:
                    for chunk in response.chunks:
                        self._accept(call, ids, chunk, parts)
            finally:
                stream.cancel()

    def _request(self, prompts: Sequence[_Prompt]) -> GenerateRequest:
        size = self._generation.samples_per_prompt
        return GenerateRequest(
            prompts=[
                Prompt(
                    token_ids=encode(prompt.token_ids),
                    adapter=self._teacher.config.adapter,
                    sampling=SamplingParams(max_new_tokens=prompt.max_new_tokens, seed=prompt.seed),
                    sample_indices=[each for each in range(size) if each not in prompt.samples],
                )
                for prompt in prompts
            ],
            sampling=SamplingParams(temperature=self._generation.temperature, top_p=self._generation.top_p),
            num_samples=size,
            distributions=self._distributions,
            whole_samples=True,
        )

    def _accept(
        self,
        call: Call[_Prompt, list[TeacherSample]],
        ids: Sequence[int],
        chunk: SampleChunk,
        parts: dict[tuple[int, int], list[SampleChunk]],
    ) -> None:
        """Takes in one part of a sample; `parts` holds the earlier ones of this call."""
        if not 0 <= chunk.prompt_index < len(ids):
            raise StillhouseError(
                Reason.TENSOR_INVALID,
                f"The teacher answered prompt {chunk.prompt_index} of {len(ids)}. Bring both sides to one version.",
            )
        prompt_id = ids[chunk.prompt_index]
        prompt = call.item(prompt_id)
        if prompt is None:
            return
        if chunk.HasField("error"):
            self._refuse(call, prompt_id, prompt.place, from_status(chunk.error))
            return
        key = chunk.prompt_index, chunk.sample_index
        if not 0 <= chunk.sample_index < self._generation.samples_per_prompt:
            raise _invalid(
                prompt, f"sample {chunk.sample_index} of {self._generation.samples_per_prompt} from 0 on"
            )
        found = parts.setdefault(key, [])
        found.append(chunk)
        num_bytes = sum(len(each.token_ids.data) for each in found)
        if len(found) > prompt.max_new_tokens + 2 or num_bytes > _ID_BYTES * prompt.max_new_tokens:
            raise _invalid(
                prompt,
                f"{len(found)} parts with {num_bytes // _ID_BYTES} tokens of one sample, at most {prompt.max_new_tokens} "
                "were asked for",
            )
        if chunk.finish_reason == SampleChunk.FINISH_REASON_UNSPECIFIED:
            return
        prompt.samples[chunk.sample_index] = self._whole(prompt, parts.pop(key))
        if len(prompt.samples) == self._generation.samples_per_prompt:
            call.answer(prompt_id, [prompt.samples[index] for index in sorted(prompt.samples)])

    def _whole(self, prompt: _Prompt, parts: list[SampleChunk]) -> TeacherSample:
        ids = [
            decode(part.token_ids, field="token_ids", dtypes=(Tensor.DATA_TYPE_INT32,), shape=(None,))
            for part in parts
            if part.HasField("token_ids")
        ]
        token_ids = np.concatenate(ids).astype(np.int32) if ids else np.zeros(0, np.int32)
        outside = token_ids.size and not (
            token_ids.min() >= 0 and token_ids.max() < self._teacher.info.vocab_size
        )
        if outside or len(token_ids) > prompt.max_new_tokens:
            raise _invalid(prompt, f"{len(token_ids)} tokens, at most {prompt.max_new_tokens} were asked for")
        rows = None
        if self._distributions is not None and token_ids.size:
            rows = Distributions.concat(
                [
                    decode_distributions(
                        part.distributions,
                        vocab_size=self._teacher.info.vocab_size,
                        max_rows=prompt.max_new_tokens,
                        max_top_k=self._distributions.top_k,
                    )
                    for part in parts
                    if part.HasField("distributions")
                ]
            )
            if (rows.start, rows.num_rows) != (len(prompt.token_ids), len(token_ids)):
                raise _invalid(prompt, f"{rows.num_rows} distributions of {len(token_ids)} tokens")
        finished = parts[-1].finish_reason == SampleChunk.FINISH_REASON_STOP
        return TeacherSample(token_ids=token_ids, distributions=rows, finished=finished)


def _invalid(prompt: _Prompt, what: str) -> StillhouseError:
    return StillhouseError(
        Reason.TENSOR_INVALID,
        f"The teacher sent {what} behind the prompt of {prompt.place}. Bring both sides to the same version of Stillhouse.",
    )
