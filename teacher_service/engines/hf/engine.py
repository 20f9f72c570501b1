"""Reference engine: transformers in this process. On a CPU a result is bitwise independent of concurrent requests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import transformers

from stillhouse.protos.errors import StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.distributions.from_logits import RowSpec, distributions, require_finite
from stillhouse.teacher_service.distributions.normalisation import prepare_kernels
from stillhouse.teacher_service.distributions.sampling import sample_token
from stillhouse.teacher_service.engine import (
    EngineInfo,
    Finish,
    Float32Array,
    GeneratedChunk,
    GenerateInput,
    LoadedAdapter,
    ScoreInput,
)
from stillhouse.teacher_service.engines.hf import quantization as hf_quantization
from stillhouse.teacher_service.engines.hf import worker
from stillhouse.teacher_service.engines.hf.adapters import LoraSlots
from stillhouse.teacher_service.engines.hf.base import ModelEngine, batch_tokens, sequence_limit
from stillhouse.teacher_service.engines.hf.model import HfModel
from stillhouse.teacher_service.engines.hf.worker import SampleJob, ScoreJob
from stillhouse.teacher_service.models import fingerprint
from stillhouse.teacher_service.models.files import ModelFiles, locate_model
from stillhouse.teacher_service.models.tokenizer import TextCodec


@dataclass(kw_only=True, slots=True)
class _SampleState:
    """Generation state of a sample between its tokens."""

    cache: Any
    generator: torch.Generator
    generated: list[int]


class HfEngine(ModelEngine):
    """Engine of a language model on transformers; sequences that share a pass have one adapter.

    Active samples take turns by one token, each with its own cache, on every device; a model without a cache that can be
    trusted reads the whole sample for each token.
    """

    def __init__(self, config: TeacherConfig, model: HfModel, codec: TextCodec, files: ModelFiles) -> None:
        self._model = model
        self._slots = LoraSlots(model.model, max_adapters=config.max_adapters, max_rank=config.max_lora_rank)
        self._seeds = np.random.default_rng(config.seed)
        self.codec = codec
        self.info = _describe(config, model, codec, files)
        super().__init__(config, model.device)

    @classmethod
    def _load(cls, config: TeacherConfig) -> Self:
        torch.set_num_threads(config.num_threads)
        files = locate_model(config.model, config.revision)
        codec = TextCodec.load(config.model, config.revision)
        # Beside the weights, which are mostly read by compiled code.
        threading.Thread(target=prepare_kernels, args=[codec.tokenizer_size], daemon=True).start()
        return cls(config, HfModel.load(config, files.directory), codec, files)

    async def generate(self, item: GenerateInput) -> AsyncIterator[GeneratedChunk]:
        """Streams one sample, one token per chunk."""
        job = self._worker.start_sample(item)
        try:
            while True:
                chunk = await self._worker.next_chunk(job)
                yield chunk
                if chunk.finish:
                    return
        finally:
            self._worker.drop_sample(job)

    async def load_adapter(self, name: str, path: Path) -> LoadedAdapter:
        """Loads an adapter between two passes of the model."""
        digest = await asyncio.to_thread(fingerprint.adapter_fingerprint, path)
        rank = await self._worker.call(partial(self._slots.load, name, path))
        return LoadedAdapter(name=name, fingerprint=digest, rank=rank, path=path)

    async def unload_adapter(self, name: str) -> None:
        """Frees an adapter between two passes of the model."""
        await self._worker.call(partial(self._slots.unload, name))

    def _compute_batch(self, batch: list[ScoreJob]) -> None:
        self._slots.activate(batch[0].item.adapter)
        # The last token is a target only: its successor is not requested.
        sequences = [job.item.token_ids[:-1] for job in batch]
        keep = max(_num_rows(job.item) for job in batch)
        layers = sorted({each for job in batch for each in job.item.options.hidden_layers})
        if layers:
            rows_BTH, states_BTDH = self._model.rows_and_states(sequences, keep, layers)
        else:
            rows_BTH, states_BTDH = self._model.last_rows(sequences, keep), None
        for number, job in enumerate(batch):
            first, own = keep - _num_rows(job.item), job.item.options.hidden_layers
            states = None
            if states_BTDH is not None and own:
                states = states_BTDH[number][first:, [layers.index(each) for each in own]].cpu().numpy()
            self._score_one(job, rows_BTH[number, first:], states)

    def _score_one(self, job: ScoreJob, rows_TH: torch.Tensor, states: Float32Array | None) -> None:
        item = job.item
        spec = RowSpec(start=item.start, sequence=item.token_ids, query_token_ids=item.query_token_ids)
        head, vocab_size = self._model.head, self._model.vocab_size
        try:
            found = distributions(rows_TH, head, spec, item.options, vocab_size=vocab_size)
            job.future.set_result(replace(found, layer_states=states))
        except StillhouseError as error:
            job.future.set_exception(error)

    def _generate_token(self, job: SampleJob) -> GeneratedChunk:
        item = job.item
        if job.state is None:
            job.state = self._begin(item)
        state: _SampleState = job.state
        generated = np.array(state.generated, np.int32)
        unread = (
            generated[-1:] if len(generated) and state.cache else np.concatenate([item.token_ids, generated])
        )
        with torch.inference_mode():
            self._slots.activate(item.adapter)
            row_1H = self._model.last_rows([unread], 1, state.cache)[0]
            logits_1V = self._model.head(row_1H).float()
            position = len(item.token_ids) + len(state.generated)
            require_finite(torch.isfinite(logits_1V).all(dim=-1), position)
            token, logprob = sample_token(
                logits_1V[0],
                temperature=item.temperature,
                top_p=item.top_p,
                top_k=item.top_k,
                num_valid=self.info.tokenizer_size,
                generator=state.generator,
            )
            state.generated.append(token)
            rows = None
            if item.options is not None:
                sequence = np.concatenate([item.token_ids, np.array(state.generated, np.int32)])
                rows = distributions(
                    row_1H,
                    lambda _: logits_1V,
                    RowSpec(start=position, sequence=sequence),
                    item.options,
                    vocab_size=self._model.vocab_size,
                )
        return GeneratedChunk(
            token_ids=np.array([token], np.int32),
            sampling_logprobs=np.array([logprob], np.float32),
            distributions=rows,
            finish=self._finish(item, state),
        )

    def _begin(self, item: GenerateInput) -> _SampleState:
        generator = torch.Generator()
        generator.manual_seed(int(self._seeds.integers(2**63)) if item.seed is None else item.seed)
        return _SampleState(cache=self._model.new_cache(), generator=generator, generated=[])

    def _finish(self, item: GenerateInput, state: _SampleState) -> Finish:
        if state.generated[-1] in self.info.eos_token_ids:
            return "stop"
        return "length" if len(state.generated) >= item.max_new_tokens else ""


def _num_rows(item: ScoreInput) -> int:
    return len(item.token_ids) - item.start


def _describe(config: TeacherConfig, model: HfModel, codec: TextCodec, files: ModelFiles) -> EngineInfo:
    capabilities = {
        teacher_pb2.CAPABILITY_LOG_PARTITIONS,
        teacher_pb2.CAPABILITY_QUERY_LOGPROBS,
        teacher_pb2.CAPABILITY_SAMPLED_TOKENS,
        teacher_pb2.CAPABILITY_TAIL_SAMPLES,
        teacher_pb2.CAPABILITY_STRATIFIED_SAMPLES,
        teacher_pb2.CAPABILITY_ENTROPY,
    }
    if config.max_adapters:
        capabilities.add(teacher_pb2.CAPABILITY_HOT_ADAPTERS)
    if model.splits:
        capabilities.add(teacher_pb2.CAPABILITY_HIDDEN_STATES)
    if model.num_layers:
        capabilities.add(teacher_pb2.CAPABILITY_LAYER_STATES)
    quantization = hf_quantization.method_of(model.model, config.quantization)
    return EngineInfo(
        model=config.model,
        revision=files.revision,
        model_fingerprint=fingerprint.model_fingerprint(
            files.directory, dtype=model.dtype, quantization=quantization
        ),
        tokenizer_size=min(codec.tokenizer_size, model.vocab_size),
        vocab_size=model.vocab_size,
        max_sequence_tokens=sequence_limit(config, model.max_sequence_tokens),
        max_top_k=config.max_top_k,
        max_query_tokens=config.max_query_tokens,
        capabilities=frozenset(capabilities),
        engine=f"hf transformers {transformers.__version__}",
        dtype=model.dtype,
        quantization=quantization,
        eos_token_ids=codec.eos_token_ids,
        max_adapters=config.max_adapters,
        batch_tokens=batch_tokens(config, model.device),
        max_running_samples=worker.MAX_ACTIVE_SAMPLES,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
    )
