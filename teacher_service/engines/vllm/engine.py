"""vLLM engine for scoring and generation: token ids in, arrays out, by the tier that `tier_selection` chose."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.library_errors import reported_as
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import (
    DistributionOptions,
    EngineInfo,
    GeneratedChunk,
    GenerateInput,
    LoadedAdapter,
    ScoreInput,
)
from stillhouse.teacher_service.engines.vllm.adapter_validation import matrix_shapes
from stillhouse.teacher_service.engines.vllm.adapters import VllmAdapters
from stillhouse.teacher_service.engines.vllm.engine_args import (
    engine_arguments,
    require_vllm,
    set_environment,
)
from stillhouse.teacher_service.engines.vllm.errors import (
    engine_dead,
    never_answered,
    not_started,
    translated,
)
from stillhouse.teacher_service.engines.vllm.processes import VllmProcesses, start_warm
from stillhouse.teacher_service.engines.vllm.sampling_params import require_whole
from stillhouse.teacher_service.engines.vllm.tier_selection import choose
from stillhouse.teacher_service.engines.vllm.tiers import PublicTier, RowsMissingError
from stillhouse.teacher_service.models.files import ModelFiles, locate_model
from stillhouse.teacher_service.models.fingerprint import model_fingerprint
from stillhouse.teacher_service.models.finite_weights import broken_weight, non_finite_logits
from stillhouse.teacher_service.models.tokenizer import TextCodec
from stillhouse.teacher_service.models.weight_names import check_weight_names

_PROBE_TOKENS = 8

_log = structlog.get_logger(__name__)


class VllmEngine:
    """Engine on vLLM's `AsyncLLM`, which runs the model in its own processes.

    Distributions are raw: at temperature 1, before any sampling parameter. Below the tier worker, vLLM reports
    nothing about the distribution after temperature, top-p and top-k, whose normaliser needs all logits. There
    `sampling_logprobs` has values where that distribution is the raw one (temperature 1, top-p 1, no top-k, no
    padding of the output layer to exclude) and for greedy samples (0), and is empty otherwise.
    """

    codec: TextCodec
    """Set by `load`, of the model's tokenizer."""

    def __init__(
        self,
        llm: Any,
        info: EngineInfo,
        adapters: VllmAdapters,
        *,
        tier: PublicTier | None = None,
        running: VllmProcesses | None = None,
    ) -> None:
        """`running` is stopped with the engine; None leaves `llm` to its owner."""
        self._llm = llm
        self.info = info
        self._adapters = adapters
        self._tier = tier or PublicTier(info)
        self._numbers = count(1)
        self._running: set[str] = set()
        self._running_llm = running or VllmProcesses(llm=llm)

    @classmethod
    async def load(cls, config: TeacherConfig) -> VllmEngine:
        """Starts the engine; returns once its model has answered.

        Raises `StillhouseError`: INVALID_CONFIG without a suitable vLLM, for settings that it refuses, or if it ends
        at its first request; MODEL_NOT_FOUND.
        """
        version = require_vllm()
        set_environment(config)
        warm = await asyncio.to_thread(start_warm, config)
        try:
            files = await asyncio.to_thread(locate_model, config.model, config.revision)
            codec = await asyncio.to_thread(TextCodec.load, config.model, config.revision)
            with reported_as(lambda error: not_started(config.model, error)):
                names = await asyncio.to_thread(check_weight_names, files.directory, config.model, whole=True)
            names.require_plain(config.model)
            running = await VllmProcesses.start(config, files.directory, engine_arguments, warm)
        finally:
            if warm is not None:
                await asyncio.to_thread(warm.close)
        llm = running.llm
        _log.info("vllm started", warm=warm is not None and warm.used)
        try:
            info = await asyncio.to_thread(_describe, config, llm, codec, files, f"vllm {version}")
            shapes = await asyncio.to_thread(matrix_shapes, files.directory)
            adapters = VllmAdapters(
                max_adapters=config.max_adapters,
                max_rank=config.max_lora_rank,
                shapes=shapes,
                weight_files=names.files,
            )
            await cls(llm, info, adapters)._require_finite(names.files)
            tier = await choose(config, llm, info, lambda tier: cls(llm, info, adapters, tier=tier))
            _log.info("vllm tier chosen", tier=tier.name)
            info = replace(
                info,
                engine=f"{info.engine} (tier {tier.name})",
                capabilities=info.capabilities
                | tier.capabilities
                | ({teacher_pb2.CAPABILITY_PREFIX_REUSE} if tier.reuse else set()),
                max_query_tokens=tier.max_query_tokens,
                **_state_sizes(llm, tier),
            )
            engine = cls(llm, info, adapters, tier=tier, running=running)
            engine.codec = codec
            await engine._warm_up()
        except BaseException as error:
            await asyncio.to_thread(running.stop)
            if isinstance(error, StillhouseError) and error.reason is Reason.TEACHER_UNREACHABLE:
                raise never_answered(config.model, str(llm.model_config.quantization or "")) from error
            raise
        return engine

    async def score(self, item: ScoreInput) -> Distributions:
        """Computes the distributions of one sequence; cancelling aborts it inside vLLM."""
        try:
            return await self.score_once(item, reuse=True)
        except RowsMissingError:
            return await self.score_once(item, reuse=False)

    async def score_once(self, item: ScoreInput, *, reuse: bool) -> Distributions:
        """Scores once, using the prefix cache only with `reuse`. Raises RowsMissingError if rows came from the cache."""
        ids, params = self._tier.score_params(item, reuse=reuse)
        output = await self._last_output(ids, params, item.adapter)
        rows = self._tier.read_scores(item, output)
        if item.on_reused is not None:
            item.on_reused(output.num_cached_tokens or 0)
        return rows

    async def generate(self, item: GenerateInput) -> AsyncIterator[GeneratedChunk]:
        """Streams the chunks of one sample; closing the iterator aborts it inside vLLM."""
        position = len(item.token_ids)
        params = self._tier.generate_params(item)
        async with aclosing(self._outputs(item.token_ids.tolist(), params, item.adapter)) as outputs:
            async for output in outputs:
                chunk = self._tier.read_chunk(item, output.outputs[0], position)
                position += len(chunk.token_ids)
                yield chunk

    async def load_adapter(self, name: str, path: Path) -> LoadedAdapter:
        """Loads an adapter while serving."""
        with translated():
            return await self._adapters.load(self._alive(), name, path)

    async def unload_adapter(self, name: str) -> None:
        """Frees the slot of an adapter."""
        with translated():
            await self._adapters.unload(self._alive(), name)

    async def check(self) -> None:
        """Raises `StillhouseError` (TEACHER_UNREACHABLE) once a process of vLLM has died, from which it does not
        recover."""
        with translated():
            await self._alive().check_health()

    async def close(self) -> None:
        """Aborts all work and ends vLLM's processes; further calls do nothing."""
        llm, self._llm = self._llm, None
        if llm is None:
            return
        if not llm.errored and self._running:
            with suppress(Exception):  # it ends in any case
                await llm.abort(list(self._running))
        await asyncio.to_thread(self._running_llm.stop)

    async def _require_finite(self, files: Sequence[Path]) -> None:
        """Raises `StillhouseError` (MODEL_NOT_FOUND) for a model whose logits are NaN or infinite, with a weight that is."""
        size = min(_PROBE_TOKENS, self.info.max_sequence_tokens)
        ids = np.random.default_rng(0).integers(0, self.info.tokenizer_size, size, dtype=np.int32)
        try:
            await self.score(ScoreInput(token_ids=ids, start=1, options=DistributionOptions(top_k=1)))
        except StillhouseError as error:
            if error.reason is not Reason.NON_FINITE:
                raise
            broken = await asyncio.to_thread(broken_weight, files)
            raise non_finite_logits(self.info.model, self.info.dtype, broken) from error

    async def _warm_up(self) -> None:
        """Scores and generates once, so that no request pays for lazy initialisation."""
        options = DistributionOptions(top_k=1)
        await self.score(ScoreInput(token_ids=np.zeros(2, np.int32), start=1, options=options))
        item = GenerateInput(token_ids=np.zeros(1, np.int32), max_new_tokens=1, options=options)
        async for _ in self.generate(item):
            pass

    async def _last_output(self, ids: list[int], params: Any, adapter: str) -> Any:
        last = None
        async with aclosing(self._outputs(ids, params, adapter)) as outputs:
            async for output in outputs:
                last = output
        if last is None:
            raise engine_dead()
        return last

    async def _outputs(self, ids: list[int], params: Any, adapter: str) -> AsyncGenerator[Any]:
        """Streams vLLM's outputs of one request; closing the generator aborts the request."""
        from vllm.inputs import tokens_input

        request_id = str(next(self._numbers))
        self._running.add(request_id)
        try:
            with translated():
                lora = self._adapters.request(adapter)
                stream = self._alive().generate(tokens_input(ids), params, request_id, lora_request=lora)
                async with aclosing(stream) as outputs:
                    async for output in outputs:
                        require_whole(output.outputs[0].finish_reason)
                        yield output
        finally:
            self._running.discard(request_id)

    def _alive(self) -> Any:
        if self._llm is None:
            raise engine_dead()
        return self._llm


def _state_sizes(llm: Any, tier: PublicTier) -> dict[str, Any]:
    """Layers and units of the hidden states, of which the tier worker gives the last one; empty where a tier gives none."""
    if teacher_pb2.CAPABILITY_HIDDEN_STATES not in tier.capabilities:
        return {}
    model = llm.model_config
    return {
        "num_layers": int(model.hf_text_config.num_hidden_layers),
        "hidden_size": int(model.get_hidden_size()),
    }


def _describe(
    config: TeacherConfig, llm: Any, codec: TextCodec, files: ModelFiles, engine: str
) -> EngineInfo:
    model = llm.model_config
    dtype = str(model.dtype).removeprefix("torch.")
    quantization = str(model.quantization or "")
    vocab_size = int(model.get_vocab_size())
    return EngineInfo(
        model=config.model,
        revision=files.revision,
        model_fingerprint=model_fingerprint(files.directory, dtype=dtype, quantization=quantization),
        tokenizer_size=min(codec.tokenizer_size, vocab_size),
        vocab_size=vocab_size,
        max_sequence_tokens=int(model.max_model_len),
        max_top_k=config.max_top_k,
        max_query_tokens=0,
        capabilities=frozenset({teacher_pb2.CAPABILITY_HOT_ADAPTERS} if config.max_adapters else ()),
        engine=engine,
        dtype=dtype,
        quantization=quantization,
        eos_token_ids=codec.eos_token_ids,
        max_adapters=config.max_adapters,
        batch_tokens=int(llm.vllm_config.scheduler_config.max_num_batched_tokens),
        max_running_samples=int(llm.vllm_config.scheduler_config.max_num_seqs),
    )
