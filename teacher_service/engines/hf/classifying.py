"""Parts that all engines of a sequence classifier share: its description, its rows, and refusals of what it has not."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tensors.classes import class_row
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import (
    EngineInfo,
    Float32Array,
    GeneratedChunk,
    GenerateInput,
    LoadedAdapter,
)
from stillhouse.teacher_service.engines.hf.base import sequence_limit
from stillhouse.teacher_service.engines.hf.classifier import ClassifierModel
from stillhouse.teacher_service.models import fingerprint
from stillhouse.teacher_service.models.files import ModelFiles
from stillhouse.teacher_service.models.tokenizer import TextCodec


class TextlessEngine:
    """The part of an engine that writes no text and takes no adapters; the servicer refuses both before."""

    async def generate(self, item: GenerateInput) -> AsyncIterator[GeneratedChunk]:  # noqa: ARG002
        """Raises `StillhouseError` (CAPABILITY)."""
        raise classifier_lacks("completions")
        yield  # makes this an iterator

    async def load_adapter(self, name: str, path: Path) -> LoadedAdapter:  # noqa: ARG002
        """Raises `StillhouseError` (CAPABILITY)."""
        raise classifier_lacks("adapters")

    async def unload_adapter(self, name: str) -> None:  # noqa: ARG002
        """Raises `StillhouseError` (CAPABILITY)."""
        raise classifier_lacks("adapters")


def require_no_adapters(config: TeacherConfig) -> None:
    """Raises `StillhouseError` (INVALID_CONFIG) if adapters are named."""
    if config.adapters:
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"--adapter names {config.adapters[0][0]}, and {config.model} is a classifier, which is served without adapters. "
            "Merge it into the model, or leave it out.",
        )


def classifier_lacks(what: str) -> StillhouseError:
    """Builds the error of a request that classifiers cannot serve."""
    return StillhouseError(
        Reason.CAPABILITY,
        f"This teacher is a classifier and has no {what}. Request classes alone.",
        metadata={"capability": "CAPABILITY_CLASSES"},
    )


def finite_row(logprobs: Float32Array, num_tokens: int) -> Distributions:
    """The class row of log-probabilities [C]. Raises `StillhouseError` (NON_FINITE)."""
    row = class_row(logprobs, num_tokens)
    if not np.isfinite(row.logprobs).all():
        raise StillhouseError(
            Reason.NON_FINITE,
            "The classifier's logits for this sequence are NaN or infinite. Look at its weights, or choose another --dtype.",
        )
    return row


def describe_classifier(
    config: TeacherConfig, model: ClassifierModel, codec: TextCodec, files: ModelFiles
) -> EngineInfo:
    """The information of a classifier, without hidden states. Raises `StillhouseError` (INVALID_CONFIG)."""
    return EngineInfo(
        model=config.model,
        revision=files.revision,
        model_fingerprint=fingerprint.model_fingerprint(files.directory, dtype=model.dtype, quantization=""),
        tokenizer_size=min(codec.tokenizer_size, model.vocab_size),
        vocab_size=model.vocab_size,
        max_sequence_tokens=sequence_limit(config, model.max_sequence_tokens),
        max_top_k=config.max_top_k,
        max_query_tokens=0,
        capabilities=frozenset({teacher_pb2.CAPABILITY_CLASSES}),
        engine="",
        dtype=model.dtype,
        quantization="",
        eos_token_ids=codec.eos_token_ids,
        max_adapters=0,
        class_names=model.class_names,
        num_token_types=model.num_token_types,
    )
