"""One Generate call: samples are generated concurrently; tokens, text and distributions stream as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace

from stillhouse.protos.errors import StillhouseError, to_status
from stillhouse.protos.rows.conversation import Turns
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tensors.distributions import encode
from stillhouse.teacher_service.admission.response_budget import CallBudget
from stillhouse.teacher_service.engine import (
    DistributionOptions,
    GeneratedChunk,
    GenerateInput,
    Int32Array,
    LoadedAdapter,
)
from stillhouse.teacher_service.rpc import sample_chunks
from stillhouse.teacher_service.rpc.generate_validation import (
    check_call,
    check_prompt,
    check_samples,
    check_sampling,
    check_student_prompt,
    conversation_of,
    seed_of,
)
from stillhouse.teacher_service.rpc.response_batcher import PART_BYTES, ResponseBatcher, cancel_all
from stillhouse.teacher_service.rpc.score_validation import WireFormat, check_distributions, invalid_request
from stillhouse.teacher_service.rpc.service_state import ServiceState

_FINISH = {
    "": teacher_pb2.SampleChunk.FINISH_REASON_UNSPECIFIED,
    "stop": teacher_pb2.SampleChunk.FINISH_REASON_STOP,
    "length": teacher_pb2.SampleChunk.FINISH_REASON_LENGTH,
}
_OVERHEAD_BYTES = 256
"""Bytes of a chunk besides its arrays and text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prompt:
    token_ids: Int32Array
    student_ids: Int32Array | None
    turns: Turns | None
    sampling: teacher_pb2.SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class _SampleUpdate:
    """New tokens and text of a sample, or its error."""

    key: tuple[int, int]
    chunk: GeneratedChunk | None = None
    text: str = ""
    prompt_tokens: int = 0
    prompt_ids: Int32Array | None = None
    student_ids: Int32Array | None = None
    adapter_fingerprint: str = ""
    error: Exception | None = None
    num_bytes: int = 0
    """Bytes charged until sent."""


class GenerateSession:
    """State of one call; nothing outlives it."""

    def __init__(self, serving: ServiceState, request: teacher_pb2.GenerateRequest, *, client: str) -> None:
        """Raises `StillhouseError` for an invalid call."""
        check_call(request, serving)
        self._serving = serving
        self._request = request
        self._client = client
        self._options: DistributionOptions | None = None
        self._wire: WireFormat | None = None
        if request.HasField("distributions"):
            self._options, self._wire = check_distributions(request.distributions, serving.info)
            if self._options.hidden_layers:
                raise invalid_request(
                    "hidden_layers are set, and Generate reports no layer_states. Score the texts."
                )
        self._batcher: ResponseBatcher[_SampleUpdate] = ResponseBatcher()
        self._unread = CallBudget(serving.budget)
        self._prompts: dict[int, _Prompt | StillhouseError] = {}

    async def responses(self) -> AsyncGenerator[teacher_pb2.GenerateResponse, None]:
        """Yields the messages of the call. Closing it aborts all generation."""
        running = asyncio.create_task(self._generate_all())
        try:
            async with aclosing(self._batcher.batches()) as batches:
                async for update in batches:
                    yield teacher_pb2.GenerateResponse(
                        chunks=[self._to_message(each) for each in _merged(update)]
                    )
                    # Here the transport has taken the message; it waits for a slow caller.
                    self._unread.release(sum(each.num_bytes for each in update))
        finally:
            await cancel_all({running})
            self._unread.release_all()

    async def _generate_all(self) -> None:
        error: Exception | None = None
        keys = self._keys()
        num_generators = min(self._serving.config.max_inflight_sequences, sum(1 for _ in self._keys()))
        try:
            async with asyncio.TaskGroup() as generators:
                for _ in range(num_generators):
                    generators.create_task(self._generate_samples(keys))
        except ExceptionGroup as group:
            error = group
        self._batcher.end(error)

    def _keys(self) -> Iterator[tuple[int, int]]:
        for prompt_index, prompt in enumerate(self._request.prompts):
            for sample_index in check_samples(prompt, self._request.num_samples):
                yield prompt_index, sample_index

    async def _generate_samples(self, keys: Iterator[tuple[int, int]]) -> None:
        """Generates samples one after the other, until none is left."""
        for key in keys:
            try:
                await self._generate(key)
            except Exception as error:
                self._enqueue(_SampleUpdate(key=key, error=error, num_bytes=_OVERHEAD_BYTES))

    async def _generate(self, key: tuple[int, int]) -> None:
        prompt = await self._prompt(key[0])
        self._serving.counters.samples_started += 1
        cost = self._serving.capacity.generate_cost(len(prompt.token_ids), self._num_new(prompt))
        async with self._serving.adapters.use(self._request.prompts[key[0]].adapter) as adapter:
            while True:
                await self._unread.wait_for_room()
                async with self._serving.admission.turn(self._client, cost):
                    if self._unread.has_room:
                        # From here on it is generated to its end, read or not: a slow caller must not hold a slot of the engine.
                        await self._stream(key, prompt, adapter)
                        return

    async def _prompt(self, index: int) -> _Prompt:
        """Returns the validated prompt, or raises its error for each of its samples."""
        if index not in self._prompts:
            self._prompts[index] = await asyncio.to_thread(self._check_prompt, index)
        prompt = self._prompts[index]
        if isinstance(prompt, StillhouseError):
            raise prompt
        return prompt

    def _check_prompt(self, index: int) -> _Prompt | StillhouseError:
        prompt = self._request.prompts[index]
        try:
            sampling = check_sampling(self._request.sampling, prompt.sampling)
            self._serving.codec.check_stop(sampling.stop)
            ids = check_prompt(prompt, self._serving.codec, self._serving.info)
            student = check_student_prompt(prompt, self._serving.codec, self._serving.info)
            turns = None
            if teacher_pb2.CAPABILITY_GENERATION_ONLY in self._serving.info.capabilities:
                turns = conversation_of(prompt)
            return _Prompt(token_ids=ids, student_ids=student, turns=turns, sampling=sampling)
        except StillhouseError as error:
            return error

    async def _stream(self, key: tuple[int, int], prompt: _Prompt, adapter: LoadedAdapter | None) -> None:
        sampling, num_prompt = prompt.sampling, len(prompt.token_ids)
        item = GenerateInput(
            token_ids=prompt.token_ids,
            adapter=adapter.name if adapter else "",
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=self._num_new(prompt),
            seed=seed_of(sampling, prompt.token_ids, key[1]),
            options=self._options,
            turns=prompt.turns,
            single_chunk=self._request.whole_samples and not sampling.stop and not self._request.part_tokens,
            # A stop string is found where a chunk comes.
            chunk_tokens=self._request.part_tokens
            if self._request.whole_samples and not sampling.stop
            else 0,
        )
        decoder = self._serving.codec.stream_decoder(sampling.stop, prompt.token_ids.tolist())
        pending = sample_chunks.PendingChunks()
        withheld: list[_SampleUpdate] = []
        num_withheld = 0
        first = True
        async with aclosing(self._serving.engine.generate(item)) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                decoded = decoder.push(chunk.token_ids, final=bool(chunk.finish))
                pending.add(chunk)
                finish = "stop" if decoded.matched_stop else chunk.finish
                kept = pending.release(decoded.num_ids_kept, finish)
                if len(kept.token_ids) or decoded.text or finish:
                    one = _SampleUpdate(
                        key=key,
                        chunk=kept,
                        text=decoded.text,
                        prompt_tokens=num_prompt if first else 0,
                        prompt_ids=prompt.token_ids if first and self._request.prompt_token_ids else None,
                        student_ids=prompt.student_ids if first and self._request.prompt_token_ids else None,
                        adapter_fingerprint=adapter.fingerprint if adapter else "",
                    )
                    first = False
                    withheld.append(one)
                    num_withheld += len(kept.token_ids)
                    if finish or self._is_part(num_withheld):
                        self._enqueue_cut(next(_merged(withheld)))
                        withheld.clear()
                        num_withheld = 0
                if finish:
                    return

    def _is_part(self, num_tokens: int) -> bool:
        """True if the caller wants so many tokens of an unfinished sample."""
        return not self._request.whole_samples or 0 < self._request.part_tokens <= num_tokens

    def _num_new(self, prompt: _Prompt) -> int:
        room = self._serving.info.max_sequence_tokens - len(prompt.token_ids)
        return min(prompt.sampling.max_new_tokens, room)

    def _enqueue_cut(self, update: _SampleUpdate) -> None:
        """Cuts an update that exceeds one message; text and prompt go with the first part, the finish with the last."""
        assert update.chunk is not None
        self._serving.counters.tokens_generated += len(update.chunk.token_ids)
        self._serving.throughput.generated(self._client, len(update.chunk.token_ids))
        ids = [each for each in (update.prompt_ids, update.student_ids) if each is not None]
        beside_bytes = len(update.text.encode()) + sum(each.nbytes for each in ids)
        rest = replace(update, text="", prompt_tokens=0, prompt_ids=None, student_ids=None)
        for part in sample_chunks.cut(update.chunk, PART_BYTES - beside_bytes - _OVERHEAD_BYTES):
            num_bytes = _OVERHEAD_BYTES + beside_bytes + sample_chunks.num_bytes(part)
            self._enqueue(replace(update, chunk=part, num_bytes=num_bytes))
            update, beside_bytes = rest, 0

    def _enqueue(self, update: _SampleUpdate) -> None:
        self._unread.charge(update.num_bytes)
        self._batcher.put(update, update.num_bytes)

    def _to_message(self, update: _SampleUpdate) -> teacher_pb2.SampleChunk:
        message = teacher_pb2.SampleChunk(
            prompt_index=update.key[0],
            sample_index=update.key[1],
            text=update.text,
            prompt_tokens=update.prompt_tokens,
            adapter_fingerprint=update.adapter_fingerprint,
        )
        if update.prompt_ids is not None:
            message.prompt_token_ids.CopyFrom(encode(update.prompt_ids))
        if update.student_ids is not None:
            message.student_prompt_token_ids.CopyFrom(encode(update.student_ids))
        if update.error is not None:
            message.error.CopyFrom(to_status(update.error))
        if update.chunk is not None:
            message.token_ids.CopyFrom(encode(update.chunk.token_ids))
            if len(update.chunk.sampling_logprobs) == len(update.chunk.token_ids):
                message.sampling_logprobs.CopyFrom(encode(update.chunk.sampling_logprobs))
            message.finish_reason = _FINISH[update.chunk.finish]
            if self._wire is not None and update.chunk.distributions is not None:
                message.distributions.CopyFrom(self._wire.encode(update.chunk.distributions))
        return message


def _merged(update: list[_SampleUpdate]) -> Iterator[_SampleUpdate]:
    """Merges the updates of each sample, in order."""
    by_key: dict[tuple[int, int], list[_SampleUpdate]] = {}
    for each in update:
        by_key.setdefault(each.key, []).append(each)
    for several in by_key.values():
        chunks = [each.chunk for each in several if each.chunk is not None]
        yield replace(
            several[0],
            chunk=sample_chunks.join(chunks) if chunks else None,
            text="".join(each.text for each in several),
            error=several[-1].error,
        )
