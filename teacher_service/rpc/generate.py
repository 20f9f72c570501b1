"""One Generate call: samples are written side by side, and their tokens, text and distributions stream out as they come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, replace

from stillhouse.protos.errors import StillhouseError, to_status
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tensors.distributions import encode
from stillhouse.teacher_service.admission.response_budget import UnreadAnswers
from stillhouse.teacher_service.engine import (
    DistributionOptions,
    GeneratedPiece,
    GenerateItem,
    Int32Array,
    LoadedAdapter,
)
from stillhouse.teacher_service.rpc import sample_chunks
from stillhouse.teacher_service.rpc.generate_validation import (
    Sampling,
    check_call,
    check_prompt,
    check_samples,
    check_sampling,
    seed_of,
)
from stillhouse.teacher_service.rpc.response_batcher import PART_BYTES, Outbox, cancel_all
from stillhouse.teacher_service.rpc.score_validation import Wire, check_distributions
from stillhouse.teacher_service.rpc.service_state import Serving

_FINISH = {
    "": teacher_pb2.SampleChunk.FINISH_REASON_UNSPECIFIED,
    "stop": teacher_pb2.SampleChunk.FINISH_REASON_STOP,
    "length": teacher_pb2.SampleChunk.FINISH_REASON_LENGTH,
}
_CHUNK_BYTES = 256
"""Room for what a chunk has besides its arrays and its text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prompt:
    token_ids: Int32Array
    sampling: Sampling


@dataclass(frozen=True, kw_only=True, slots=True)
class _News:
    """What a sample adds."""

    key: tuple[int, int]
    piece: GeneratedPiece | None = None
    text: str = ""
    prompt_tokens: int = 0
    prompt_ids: Int32Array | None = None
    adapter_fingerprint: str = ""
    error: Exception | None = None
    num_bytes: int = 0
    """What it takes until it has left."""


class GenerateSession:
    """The state of one call; nothing of it outlives the call."""

    def __init__(self, serving: Serving, request: teacher_pb2.GenerateRequest, *, client: str) -> None:
        """Raises `StillhouseError` for a call that makes no sense as a whole."""
        check_call(request, serving)
        self._serving = serving
        self._request = request
        self._client = client
        self._options: DistributionOptions | None = None
        self._wire: Wire | None = None
        if request.HasField("distributions"):
            self._options, self._wire = check_distributions(request.distributions, serving.info)
        self._outbox: Outbox[_News] = Outbox()
        self._unread = UnreadAnswers(serving.memory)
        self._prompts: dict[int, _Prompt | StillhouseError] = {}

    async def responses(self) -> AsyncGenerator[teacher_pb2.GenerateResponse, None]:
        """The messages of the call. Closing it aborts what is being written."""
        running = asyncio.create_task(self._write_all())
        try:
            async with aclosing(self._outbox.gathered()) as gathered:
                async for news in gathered:
                    yield teacher_pb2.GenerateResponse(chunks=[self._chunk(each) for each in _merged(news)])
                    # Here the message has been handed to the transport, which waits for a slow caller.
                    self._unread.free(sum(each.num_bytes for each in news))
        finally:
            await cancel_all({running})
            self._unread.clear()

    async def _write_all(self) -> None:
        error: Exception | None = None
        keys = self._keys()
        num_writers = min(self._serving.config.max_inflight_sequences, sum(1 for _ in self._keys()))
        try:
            async with asyncio.TaskGroup() as writers:
                for _ in range(num_writers):
                    writers.create_task(self._write_samples(keys))
        except ExceptionGroup as group:
            error = group
        self._outbox.end(error)

    def _keys(self) -> Iterator[tuple[int, int]]:
        for prompt_index, prompt in enumerate(self._request.prompts):
            for sample_index in check_samples(prompt, self._request.num_samples):
                yield prompt_index, sample_index

    async def _write_samples(self, keys: Iterator[tuple[int, int]]) -> None:
        """Writes one sample after the other, as long as there are any."""
        for key in keys:
            try:
                await self._write(key)
            except Exception as error:
                self._say(_News(key=key, error=error, num_bytes=_CHUNK_BYTES))

    async def _write(self, key: tuple[int, int]) -> None:
        prompt = await self._prompt(key[0])
        self._serving.counters.samples_started += 1
        cost = self._serving.capacity.writing(len(prompt.token_ids), self._num_new(prompt))
        async with self._serving.adapters.use(self._request.prompts[key[0]].adapter) as adapter:
            while True:
                await self._unread.room()
                async with self._serving.admission.turn(self._client, cost):
                    if self._unread.has_room:
                        # Now it is written to its end, read or not: its place in the engine is not its caller's to keep.
                        await self._stream(key, prompt, adapter)
                        return

    async def _prompt(self, index: int) -> _Prompt:
        """The checked prompt; raises what is wrong with it, for each of its samples."""
        if index not in self._prompts:
            self._prompts[index] = await asyncio.to_thread(self._check_prompt, index)
        prompt = self._prompts[index]
        if isinstance(prompt, StillhouseError):
            raise prompt
        return prompt

    def _check_prompt(self, index: int) -> _Prompt | StillhouseError:
        prompt = self._request.prompts[index]
        try:
            own = prompt.sampling if prompt.HasField("sampling") else None
            sampling = check_sampling(self._request.sampling, own)
            return _Prompt(
                token_ids=check_prompt(prompt, self._serving.codec, self._serving.info), sampling=sampling
            )
        except StillhouseError as error:
            return error

    async def _stream(self, key: tuple[int, int], prompt: _Prompt, adapter: LoadedAdapter | None) -> None:
        sampling, num_prompt = prompt.sampling, len(prompt.token_ids)
        item = GenerateItem(
            token_ids=prompt.token_ids,
            adapter=adapter.name if adapter else "",
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_new_tokens=self._num_new(prompt),
            seed=seed_of(sampling, prompt.token_ids, key[1]),
            options=self._options,
            whole=self._request.whole_samples and not sampling.stop,
        )
        decoder = self._serving.codec.stream_decoder(sampling.stop, prompt.token_ids.tolist())
        held = sample_chunks.Held()
        withheld: list[_News] = []
        first = True
        async with aclosing(self._serving.engine.generate(item)) as written:  # type: ignore[type-var]
            async for piece in written:
                decoded = decoder.push(piece.token_ids, final=bool(piece.finish))
                held.add(piece)
                finish = "stop" if decoded.matched_stop else piece.finish
                kept = held.give(decoded.num_ids_kept, finish)
                if len(kept.token_ids) or decoded.text or finish:
                    one = _News(
                        key=key,
                        piece=kept,
                        text=decoded.text,
                        prompt_tokens=num_prompt if first else 0,
                        prompt_ids=prompt.token_ids if first and self._request.prompt_token_ids else None,
                        adapter_fingerprint=adapter.fingerprint if adapter else "",
                    )
                    first = False
                    withheld.append(one)
                    if finish or not self._request.whole_samples:
                        self._put(next(_merged(withheld)))
                        withheld.clear()
                if finish:
                    return

    def _num_new(self, prompt: _Prompt) -> int:
        room = self._serving.info.max_sequence_tokens - len(prompt.token_ids)
        return min(prompt.sampling.max_new_tokens, room)

    def _put(self, news: _News) -> None:
        """Cuts what is too long for one message; text and prompt go with the first part, the end with the last."""
        assert news.piece is not None
        self._serving.counters.tokens_generated += len(news.piece.token_ids)
        beside_bytes = len(news.text.encode()) + (0 if news.prompt_ids is None else news.prompt_ids.nbytes)
        for index, part in enumerate(sample_chunks.cut(news.piece, PART_BYTES - beside_bytes - _CHUNK_BYTES)):
            one = _News(
                key=news.key,
                piece=part,
                text=news.text if index == 0 else "",
                prompt_tokens=news.prompt_tokens if index == 0 else 0,
                prompt_ids=news.prompt_ids if index == 0 else None,
                adapter_fingerprint=news.adapter_fingerprint,
                num_bytes=_CHUNK_BYTES + (beside_bytes if index == 0 else 0) + sample_chunks.num_bytes(part),
            )
            self._say(one)

    def _say(self, news: _News) -> None:
        self._unread.add(news.num_bytes)
        self._outbox.put(news, news.num_bytes)

    def _chunk(self, news: _News) -> teacher_pb2.SampleChunk:
        chunk = teacher_pb2.SampleChunk(
            prompt_index=news.key[0],
            sample_index=news.key[1],
            text=news.text,
            prompt_tokens=news.prompt_tokens,
            adapter_fingerprint=news.adapter_fingerprint,
        )
        if news.prompt_ids is not None:
            chunk.prompt_token_ids.CopyFrom(encode(news.prompt_ids))
        if news.error is not None:
            chunk.error.CopyFrom(to_status(news.error))
        if news.piece is not None:
            chunk.token_ids.CopyFrom(encode(news.piece.token_ids))
            if len(news.piece.sampling_logprobs) == len(news.piece.token_ids):
                chunk.sampling_logprobs.CopyFrom(encode(news.piece.sampling_logprobs))
            chunk.finish_reason = _FINISH[news.piece.finish]
            if self._wire is not None and news.piece.distributions is not None:
                chunk.distributions.CopyFrom(self._wire.encode(news.piece.distributions))
        return chunk


def _merged(news: list[_News]) -> Iterator[_News]:
    """What is for one message, with everything that one sample adds in one place; a sample's order stays."""
    by_key: dict[tuple[int, int], list[_News]] = {}
    for each in news:
        by_key.setdefault(each.key, []).append(each)
    for several in by_key.values():
        written = [each.piece for each in several if each.piece is not None]
        yield replace(
            several[0],
            piece=sample_chunks.join(written) if written else None,
            text="".join(each.text for each in several),
            error=several[-1].error,
        )
