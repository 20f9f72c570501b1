"""vLLM engine of sequence classifiers, on its pooling runner: token ids in, the logits before any activation out.

At the start some sequences are compared with transformers: a model that vLLM computes otherwise is refused, not served.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import DistributionOptions, EngineInfo, Int32Array, ScoreInput
from stillhouse.teacher_service.engines.hf.classifier import ClassifierModel
from stillhouse.teacher_service.engines.hf.classifying import (
    TextlessEngine,
    describe_classifier,
    finite_row,
    require_no_adapters,
)
from stillhouse.teacher_service.engines.vllm.engine_args import (
    pooling_arguments,
    require_vllm,
    set_environment,
)
from stillhouse.teacher_service.engines.vllm.errors import engine_dead, never_answered, translated
from stillhouse.teacher_service.engines.vllm.processes import VllmProcesses
from stillhouse.teacher_service.models.files import locate_model
from stillhouse.teacher_service.models.fingerprint import model_fingerprint
from stillhouse.teacher_service.models.tokenizer import TextCodec

TOLERANCES = {"float32": 1e-4, "float16": 0.05}
"""Largest difference of a log-probability from that of transformers in float32, by the type of the computation."""
_ROUGH = 0.3
"""For bfloat16, which rounds each layer by 0.4 %."""
_PROBE_LENGTHS = (2, 5, 16)

log = structlog.get_logger(__name__)


class VllmClassifierEngine(TextlessEngine):
    """Engine of a sequence classifier on vLLM's `AsyncLLM`, without adapters and hidden states."""

    codec: TextCodec
    """Set by `load`, of the model's tokenizer."""

    def __init__(self, running: VllmProcesses, info: EngineInfo) -> None:
        self._running: VllmProcesses | None = running
        self.info = info
        self._numbers = count(1)

    @classmethod
    async def load(cls, config: TeacherConfig) -> VllmClassifierEngine:
        """Starts the engine; returns once its classes are those of transformers.

        Raises `StillhouseError`: INVALID_CONFIG without a suitable vLLM, or for a classifier that it does not start with or
        computes otherwise; MODEL_NOT_FOUND.
        """
        version = require_vllm()
        set_environment(config)
        require_no_adapters(config)
        files = await asyncio.to_thread(locate_model, config.model, config.revision)
        codec = await asyncio.to_thread(TextCodec.load, config.model, config.revision)
        exact = await asyncio.to_thread(
            ClassifierModel.load,
            replace(config, dtype="float32"),
            files.directory,
            codec.max_tokens,
            on_cpu=True,
        )
        info = describe_classifier(config, exact, codec, files)
        probes = _probes(info)
        wanted = [await asyncio.to_thread(_logprobs, exact, each) for each in probes]
        del exact
        running = await VllmProcesses.start(
            replace(config, max_sequence_tokens=info.max_sequence_tokens), files.directory, pooling_arguments
        )
        try:
            dtype = str(running.llm.model_config.dtype).removeprefix("torch.")
            info = replace(
                info,
                engine=f"vllm {version} classifier",
                dtype=dtype,
                model_fingerprint=await asyncio.to_thread(
                    model_fingerprint, files.directory, dtype=dtype, quantization=""
                ),
                batch_tokens=int(running.llm.vllm_config.scheduler_config.max_num_batched_tokens),
            )
            engine = cls(running, info)
            engine.codec = codec
            await engine._require_same(probes, wanted)
        except BaseException as error:
            await asyncio.to_thread(running.stop)
            if isinstance(error, StillhouseError) and error.reason is Reason.TEACHER_UNREACHABLE:
                raise never_answered(config.model, "") from error
            raise
        return engine

    async def score(self, item: ScoreInput) -> Distributions:
        """Computes the class row of one sequence; cancelling aborts it inside vLLM."""
        from vllm import PoolingParams
        from vllm.inputs import tokens_input

        params = PoolingParams(
            task="classify", use_activation=False, extra_kwargs=_types(item.token_type_ids)
        )
        found = None
        with translated():
            stream = self._alive().encode(
                tokens_input(item.token_ids.tolist()), params, str(next(self._numbers))
            )
            async for output in stream:
                found = output
        if found is None:
            raise engine_dead()
        logits = np.asarray(found.outputs.data.double().cpu().numpy()).reshape(-1)
        logits -= logits.max()
        logprobs = logits - np.log(np.exp(logits).sum())
        if logprobs.shape != (len(self.info.class_names),):
            raise StillhouseError(
                Reason.INVALID_CONFIG,
                f"vLLM gives {len(logprobs)} logits of {self.info.model}, which has {len(self.info.class_names)} classes. Start the "
                "teacher with --engine hf.",
            )
        return finite_row(logprobs.astype(np.float32), len(item.token_ids))

    async def check(self) -> None:
        """Raises `StillhouseError` (TEACHER_UNREACHABLE) once a process of vLLM has died, from which it does not
        recover."""
        with translated():
            await self._alive().check_health()

    async def close(self) -> None:
        """Ends vLLM's processes; further calls do nothing."""
        running, self._running = self._running, None
        if running is not None:
            with suppress(asyncio.CancelledError):
                await asyncio.to_thread(running.stop)

    def _alive(self) -> Any:
        if self._running is None:
            raise engine_dead()
        return self._running.llm

    async def _require_same(self, probes: list[ScoreInput], wanted: list[np.ndarray]) -> None:
        """Raises `StillhouseError` (INVALID_CONFIG) unless the classes of `probes` are those that transformers computes."""
        found = await asyncio.gather(*(self.score(each) for each in probes))
        worst = max(
            float(np.abs(row.logprobs[0] - logprobs).max())
            for row, logprobs in zip(found, wanted, strict=True)
        )
        tolerance = TOLERANCES.get(self.info.dtype, _ROUGH)
        if not worst <= tolerance:
            raise StillhouseError(
                Reason.INVALID_CONFIG,
                f"vLLM computes other classes of {self.info.model} than transformers does: log-probabilities differ by {worst:.3g}, "
                f"and {tolerance:g} is the limit in {self.info.dtype}. Start the teacher with --engine hf.",
            )
        log.info("classes compared with transformers", difference=worst, limit=tolerance)


def _probes(info: EngineInfo) -> list[ScoreInput]:
    """Sequences of random tokens, and pairs where the model tells them apart."""
    rng = np.random.default_rng(0)
    options = DistributionOptions(top_k=0, classes=True)
    probes = []
    for length in sorted({min(each, info.max_sequence_tokens) for each in _PROBE_LENGTHS}):
        ids = rng.integers(0, info.tokenizer_size, length, dtype=np.int32)
        pair = (np.arange(length) >= length // 2).astype(np.int32)
        for types in (None, pair) if info.num_token_types > 1 else (None,):
            probes.append(ScoreInput(token_ids=ids, start=length - 1, token_type_ids=types, options=options))
    return probes


def _logprobs(model: ClassifierModel, item: ScoreInput) -> np.ndarray:
    import torch

    with torch.inference_mode():
        logits, _ = model.logits([item.token_ids], [item.token_type_ids])
        found: np.ndarray = logits[0].double().log_softmax(-1).numpy()
    return found


def _types(types: Int32Array | None) -> dict[str, int] | None:
    """vLLM's form of token types: the place of the first token of type 1. Raises `StillhouseError` (INVALID_REQUEST)."""
    if types is None or not types.any():
        return None
    first = int(np.argmax(types))
    if not (types[first:] == 1).all():
        raise StillhouseError(
            Reason.INVALID_REQUEST,
            "token_type_ids are not zeros and then ones, which is all that vLLM takes. Send such, or start the teacher with "
            "--engine hf.",
        )
    return {"compressed_token_type_ids": first}
