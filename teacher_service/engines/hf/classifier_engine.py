"""Reference engine of classifiers: a sequence and its classes. On a CPU a result is bitwise independent of other requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, Self

import numpy as np
import torch
import transformers

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tensors.classes import class_row
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import (
    EngineInfo,
    Float32Array,
    GeneratedChunk,
    GenerateInput,
    LoadedAdapter,
)
from stillhouse.teacher_service.engines.hf.base import ModelEngine, batch_tokens, sequence_limit
from stillhouse.teacher_service.engines.hf.classifier import ClassifierModel
from stillhouse.teacher_service.engines.hf.worker import SampleJob, ScoreJob
from stillhouse.teacher_service.models import fingerprint
from stillhouse.teacher_service.models.files import ModelFiles, locate_model
from stillhouse.teacher_service.models.tokenizer import TextCodec


class HfClassifierEngine(ModelEngine):
    """Engine of a sequence classifier on transformers, without adapters."""

    def __init__(
        self, config: TeacherConfig, model: ClassifierModel, codec: TextCodec, files: ModelFiles
    ) -> None:
        self._model = model
        self.info = _describe(config, model, codec, files)
        super().__init__(config, model.device)

    @classmethod
    def _load(cls, config: TeacherConfig) -> Self:
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

    async def generate(self, item: GenerateInput) -> AsyncIterator[GeneratedChunk]:  # noqa: ARG002
        """Raises `StillhouseError` (CAPABILITY): a classifier writes no text, which the servicer refuses before."""
        raise _lacks("completions")
        yield  # makes this an iterator

    async def load_adapter(self, name: str, path: Path) -> LoadedAdapter:  # noqa: ARG002
        """Raises `StillhouseError` (CAPABILITY), which the servicer does before."""
        raise _lacks("adapters")

    async def unload_adapter(self, name: str) -> None:  # noqa: ARG002
        """Raises `StillhouseError` (CAPABILITY), which the servicer does before."""
        raise _lacks("adapters")

    def _compute_batch(self, batch: list[ScoreJob]) -> None:
        layers = sorted({each for job in batch for each in job.item.options.hidden_layers})
        logits_BC, states_BTDH = self._model.logits(
            [job.item.token_ids for job in batch], [job.item.token_type_ids for job in batch], layers
        )
        logprobs_BC = logits_BC.log_softmax(-1).cpu().numpy()
        for number, job in enumerate(batch):
            own = [layers.index(each) for each in job.item.options.hidden_layers]
            states = (
                states_BTDH[number : number + 1, :, own].cpu().numpy()
                if states_BTDH is not None and own
                else None
            )
            self._answer(job, logprobs_BC[number], states)

    def _generate_token(self, job: SampleJob) -> NoReturn:  # noqa: ARG002
        raise _lacks("completions")

    def _answer(self, job: ScoreJob, logprobs: Float32Array, states: Float32Array | None) -> None:
        row = class_row(logprobs, len(job.item.token_ids))
        if np.isfinite(row.logprobs).all():
            job.future.set_result(replace(row, layer_states=states))
            return
        job.future.set_exception(
            StillhouseError(
                Reason.NON_FINITE,
                "The classifier's logits for this sequence are NaN or infinite. Look at its weights, or choose another --dtype.",
            )
        )


def _lacks(what: str) -> StillhouseError:
    return StillhouseError(
        Reason.CAPABILITY,
        f"This teacher is a classifier and has no {what}. Request classes alone.",
        metadata={"capability": "CAPABILITY_CLASSES"},
    )


def _describe(
    config: TeacherConfig, model: ClassifierModel, codec: TextCodec, files: ModelFiles
) -> EngineInfo:
    return EngineInfo(
        model=config.model,
        revision=files.revision,
        model_fingerprint=fingerprint.model_fingerprint(files.directory, dtype=model.dtype, quantization=""),
        tokenizer_size=min(codec.tokenizer_size, model.vocab_size),
        vocab_size=model.vocab_size,
        max_sequence_tokens=sequence_limit(config, model.max_sequence_tokens),
        max_top_k=config.max_top_k,
        max_query_tokens=0,
        capabilities=frozenset(
            {
                teacher_pb2.CAPABILITY_CLASSES,
                *([teacher_pb2.CAPABILITY_LAYER_STATES] if model.num_layers else []),
            }
        ),
        engine=f"hf transformers {transformers.__version__} classifier",
        dtype=model.dtype,
        quantization="",
        eos_token_ids=codec.eos_token_ids,
        max_adapters=0,
        batch_tokens=batch_tokens(config, model.device),
        class_names=model.class_names,
        num_token_types=model.num_token_types,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
    )
