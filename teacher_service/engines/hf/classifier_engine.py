"""Reference engine of classifiers: a sequence and its classes. On a CPU a result is bitwise independent of other requests."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import transformers

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tensors.classes import class_row
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.config import BATCH_TOKENS, TeacherConfig
from stillhouse.teacher_service.engine import (
    EngineInfo,
    Float32Array,
    GeneratedChunk,
    GenerateInput,
    LoadedAdapter,
    ScoreInput,
)
from stillhouse.teacher_service.engines.hf import worker
from stillhouse.teacher_service.engines.hf.classifier import ClassifierModel
from stillhouse.teacher_service.engines.hf.worker import SampleJob, ScoreJob, Worker, take_equal_lengths
from stillhouse.teacher_service.models import fingerprint
from stillhouse.teacher_service.models.files import ModelFiles, locate_model
from stillhouse.teacher_service.models.tokenizer import TextCodec

_CPU_BATCH_TOKENS = 512


class HfClassifierEngine:
    """Engine of a sequence classifier on transformers, without adapters. One thread owns the model; on a GPU, sequences of
    one length share a pass, and on a CPU each has its own."""

    def __init__(
        self, config: TeacherConfig, model: ClassifierModel, codec: TextCodec, files: ModelFiles
    ) -> None:
        self._model = model
        self._max_tokens = 0 if model.device.type == "cpu" else (config.max_batch_tokens or BATCH_TOKENS)
        """Tokens of a shared pass; 0 shares none."""
        self.info = _describe(config, model, codec, files)
        self._worker = Worker(
            score=self._score_batch,
            step=_never_samples,
            select_batch=self._select_batch,
            num_threads=config.num_threads,
        )

    @classmethod
    async def load(cls, config: TeacherConfig) -> HfClassifierEngine:
        """Loads the model. Raises `StillhouseError` with MODEL_NOT_FOUND or INVALID_CONFIG."""
        return await asyncio.to_thread(cls._load, config)

    @classmethod
    def _load(cls, config: TeacherConfig) -> HfClassifierEngine:
        torch.set_num_threads(config.num_threads)
        if config.adapters:
            raise StillhouseError(
                Reason.INVALID_CONFIG,
                f"--adapter names {config.adapters[0][0]}, and {config.model} is a classifier, which is served without adapters. "
                "Merge it into the model, or leave it out.",
            )
        files = locate_model(config.model, config.revision)
        codec = TextCodec.load(config.model, config.revision)
        return cls(config, ClassifierModel.load(config, files.directory, codec.max_tokens), codec, files)

    async def score(self, item: ScoreInput) -> Distributions:
        """Computes the class row of one sequence."""
        return await self._worker.score(item)

    async def generate(self, item: GenerateInput) -> AsyncIterator[GeneratedChunk]:  # noqa: ARG002
        """Raises `StillhouseError` (CAPABILITY): a classifier writes no text, which the servicer refuses before."""
        _never_samples(None)
        yield  # makes this an iterator

    async def load_adapter(self, name: str, path: Path) -> LoadedAdapter:  # noqa: ARG002
        """Raises `StillhouseError` (CAPABILITY), which the servicer does before."""
        raise _lacks("adapters")

    async def unload_adapter(self, name: str) -> None:  # noqa: ARG002
        """Raises `StillhouseError` (CAPABILITY), which the servicer does before."""
        raise _lacks("adapters")

    async def check(self) -> None:
        """Raises `StillhouseError` if the thread that owns the model has ended."""
        if self._worker.death is not None:
            raise worker.engine_dead(self._worker.death)

    async def close(self) -> None:
        """Ends the thread after its current pass."""
        await asyncio.to_thread(self._worker.close)

    def _select_batch(self, waiting: deque[ScoreJob]) -> list[ScoreJob]:
        return take_equal_lengths(waiting, self._max_tokens)

    def _score_batch(self, batch: list[ScoreJob]) -> None:
        try:
            with torch.inference_mode():
                logits_BC = self._model.logits(
                    [job.item.token_ids for job in batch], [job.item.token_type_ids for job in batch]
                )
                logprobs_BC = logits_BC.log_softmax(-1).cpu().numpy()
            for job, logprobs in zip(batch, logprobs_BC, strict=True):
                self._answer(job, logprobs)
        except Exception as error:
            worker.raise_if_fatal(error)
            if len(batch) > 1:
                for job in batch:
                    if not job.future.done():
                        self._score_batch([job])
            else:
                batch[0].future.set_exception(worker.as_input_error(error))

    def _answer(self, job: ScoreJob, logprobs: Float32Array) -> None:
        row = class_row(logprobs, len(job.item.token_ids))
        if np.isfinite(row.logprobs).all():
            job.future.set_result(row)
            return
        job.future.set_exception(
            StillhouseError(
                Reason.NON_FINITE,
                "The classifier's logits for this sequence are NaN or infinite. Look at its weights, or choose another --dtype.",
            )
        )


def _never_samples(job: SampleJob | None) -> NoReturn:  # noqa: ARG001
    raise _lacks("completions")


def _lacks(what: str) -> StillhouseError:
    return StillhouseError(
        Reason.CAPABILITY,
        f"This teacher is a classifier and has no {what}. Request classes alone.",
        metadata={"capability": "CAPABILITY_CLASSES"},
    )


def _describe(
    config: TeacherConfig, model: ClassifierModel, codec: TextCodec, files: ModelFiles
) -> EngineInfo:
    limit = config.max_sequence_tokens or model.max_sequence_tokens
    if limit > model.max_sequence_tokens:
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"--max-sequence-tokens is {limit}; {config.model} knows {model.max_sequence_tokens} positions. Lower it.",
        )
    return EngineInfo(
        model=config.model,
        revision=files.revision,
        model_fingerprint=fingerprint.model_fingerprint(files.directory, dtype=model.dtype, quantization=""),
        tokenizer_size=min(codec.tokenizer_size, model.vocab_size),
        vocab_size=model.vocab_size,
        max_sequence_tokens=limit,
        max_top_k=config.max_top_k,
        max_query_tokens=0,
        capabilities=frozenset({teacher_pb2.CAPABILITY_CLASSES}),
        engine=f"hf transformers {transformers.__version__} classifier",
        dtype=model.dtype,
        quantization="",
        eos_token_ids=codec.eos_token_ids,
        max_adapters=0,
        batch_tokens=config.max_batch_tokens or BATCH_TOKENS
        if model.device.type != "cpu"
        else _CPU_BATCH_TOKENS,
        class_names=model.class_names,
        num_token_types=model.num_token_types,
    )
