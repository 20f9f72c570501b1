"""Asks a teacher to write, ahead of the student: prompts go out and whole samples with their distributions come in, on threads of their own.

Every prompt submitted is answered once, however often a call breaks. A sample's text depends on its seed, its prompt and
its index alone, so that asking again gives the same with an engine that computes alike. The caller bounds what is in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stillhouse.protos.errors import Reason, StillhouseError, from_status
from stillhouse.protos.stillhouse.v1.teacher_pb2 import (
    DistributionConfig,
    GenerateRequest,
    Prompt,
    SampleChunk,
    SamplingParams,
)
from stillhouse.protos.stillhouse.v1.teacher_pb2_grpc import TeacherServiceStub
from stillhouse.protos.stillhouse.v1.tensor_pb2 import Tensor
from stillhouse.protos.tensors.distributions import Distributions, decode, decode_distributions, encode
from stillhouse.student_trainer.config.schema import RolloutConfig
from stillhouse.student_trainer.train.teacher.dispatcher import Lane, Lanes
from stillhouse.student_trainer.train.teacher.teacher import TeacherClient

NUM_CALLS = 2
"""Generate calls to a service side by side: while one writes its last samples, the next has begun."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """One sample, whole."""

    token_ids: NDArray[np.int32]
    """[n]: the tokens behind the prompt, the end token included if it was written."""
    distributions: Distributions | None
    """Of its tokens, counted from the first token of the prompt; None if none were asked for."""
    finished: bool
    """Whether it ended by itself, and not at its limit."""


@dataclass(eq=False, kw_only=True, slots=True)
class _Item:
    token_ids: NDArray[np.int32]
    seed: int
    max_new_tokens: int
    place: str
    cost: int
    samples: dict[int, Written] = field(default_factory=dict)
    """Those that are whole, by index."""


class TextStream(Lanes[_Item, list[Written]]):
    """A teacher's texts to prompts, by the ids that the caller gives them: a few calls at once to each of its services."""

    def __init__(
        self, teacher: TeacherClient, generation: RolloutConfig, distributions: DistributionConfig | None
    ) -> None:
        """Starts the threads; `teacher` has been reached once."""
        super().__init__(teacher, name="text-stream", threads=NUM_CALLS)
        self._generation = generation
        self._distributions = distributions
        self._start()

    def submit(
        self, prompt_id: int, token_ids: NDArray[np.int32], *, seed: int, max_new_tokens: int, place: str
    ) -> None:
        """Ask for `samples_per_prompt` texts behind a prompt; `place` is named in errors."""
        cost = len(token_ids) + max_new_tokens * self._generation.samples_per_prompt
        self._submit(
            prompt_id,
            _Item(token_ids=token_ids, seed=seed, max_new_tokens=max_new_tokens, place=place, cost=cost),
        )

    @property
    def num_asked(self) -> int:
        """Texts asked for, repetitions included."""
        return super().num_asked * self._generation.samples_per_prompt

    def _ready(self, lane: Lane) -> bool:
        with self._lock:
            # A lane that is broken looks whether its service is back, with or without work.
            lane.work.wait_for(lambda: lane.queue or not lane.is_open or self._closed)
            return not self._closed

    def _serve(self, lane: Lane, stub: TeacherServiceStub) -> None:
        """One call for all that waits, up to what one takes; returns when all of it is answered."""
        with self._lock:
            batch: list[int] = []
            while lane.queue and len(batch) < (self._teacher.info.max_prompts or len(self._pieces)):
                prompt_id = lane.queue.popleft()
                if self._owner.get(prompt_id) is lane:
                    batch.append(prompt_id)
            items = [self._pieces[prompt_id] for prompt_id in batch]
            lane.num_sent += len(batch)
        if not batch:
            return
        call = stub.Generate(self._request(items))
        with self._lock:
            lane.calls.add(call)
            over = self._closed or not lane.is_open
        parts: dict[tuple[int, int], list[SampleChunk]] = {}
        try:
            if over:
                return
            for response in call:
                for chunk in response.chunks:
                    self._accept(lane, batch, chunk, parts)
        finally:
            call.cancel()
            with self._lock:
                lane.calls.discard(call)
        if any(self._owner.get(prompt_id) is lane for prompt_id in batch) and not self._closed:
            raise StillhouseError(
                Reason.TEACHER_UNREACHABLE,
                f"The teacher at {lane.endpoint.target} ended a call early; it may be restarting.",
            )

    def _request(self, items: Sequence[_Item]) -> GenerateRequest:
        size = self._generation.samples_per_prompt
        return GenerateRequest(
            prompts=[
                Prompt(
                    token_ids=encode(item.token_ids),
                    adapter=self._teacher.config.adapter,
                    sampling=SamplingParams(max_new_tokens=item.max_new_tokens, seed=item.seed),
                    sample_indices=[each for each in range(size) if each not in item.samples],
                )
                for item in items
            ],
            sampling=SamplingParams(temperature=self._generation.temperature, top_p=self._generation.top_p),
            num_samples=size,
            distributions=self._distributions,
            whole_samples=True,
        )

    def _accept(
        self,
        lane: Lane,
        batch: list[int],
        chunk: SampleChunk,
        parts: dict[tuple[int, int], list[SampleChunk]],
    ) -> None:
        """Takes in a part of a sample; `parts` are the others of this call. Raises StillhouseError for an answer that asks to come again later."""
        if not 0 <= chunk.prompt_index < len(batch):
            raise StillhouseError(
                Reason.TENSOR_INVALID,
                f"The teacher answered prompt {chunk.prompt_index} of {len(batch)}. Bring both sides to one version.",
            )
        prompt_id = batch[chunk.prompt_index]
        item = self._pieces.get(prompt_id)
        if item is None or self._owner.get(prompt_id) is not lane:
            return
        if chunk.HasField("error"):
            self._finish(prompt_id, self._refusal(prompt_id, item, from_status(chunk.error)))
            return
        key = chunk.prompt_index, chunk.sample_index
        parts.setdefault(key, []).append(chunk)
        if chunk.finish_reason == SampleChunk.FINISH_REASON_UNSPECIFIED:
            return
        item.samples[chunk.sample_index] = self._whole(item, parts.pop(key))
        if len(item.samples) == self._generation.samples_per_prompt:
            self._finish(prompt_id, [item.samples[index] for index in sorted(item.samples)])

    def _whole(self, item: _Item, parts: list[SampleChunk]) -> Written:
        ids = [
            decode(part.token_ids, field="token_ids", dtypes=(Tensor.DATA_TYPE_INT32,), shape=(None,))
            for part in parts
            if part.HasField("token_ids")
        ]
        token_ids = np.concatenate(ids).astype(np.int32) if ids else np.zeros(0, np.int32)
        outside = token_ids.size and not (
            token_ids.min() >= 0 and token_ids.max() < self._teacher.info.vocab_size
        )
        if outside or len(token_ids) > item.max_new_tokens:
            raise _invalid(item, f"{len(token_ids)} tokens, at most {item.max_new_tokens} were asked for")
        rows = None
        if self._distributions is not None and token_ids.size:
            rows = Distributions.concat(
                [
                    decode_distributions(
                        part.distributions,
                        vocab_size=self._teacher.info.vocab_size,
                        max_rows=item.max_new_tokens,
                        max_top_k=self._distributions.top_k,
                    )
                    for part in parts
                    if part.HasField("distributions")
                ]
            )
            if (rows.start, rows.num_rows) != (len(item.token_ids), len(token_ids)):
                raise _invalid(item, f"{rows.num_rows} distributions of {len(token_ids)} tokens")
        finished = parts[-1].finish_reason == SampleChunk.FINISH_REASON_STOP
        return Written(token_ids=token_ids, distributions=rows, finished=finished)


def _invalid(item: _Item, what: str) -> StillhouseError:
    return StillhouseError(
        Reason.TENSOR_INVALID,
        f"The teacher sent {what} behind the prompt of {item.place}. Bring both sides to the same version of Stillhouse.",
    )
