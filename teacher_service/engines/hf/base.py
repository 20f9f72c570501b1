"""Base of the engines on transformers: one thread owns the model, and sequences of one length share its passes on a GPU."""

from __future__ import annotations

import abc
import asyncio
from collections import deque
from typing import Self

import torch

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.config import BATCH_TOKENS, TeacherConfig
from stillhouse.teacher_service.engine import EngineInfo, GeneratedChunk, ScoreInput
from stillhouse.teacher_service.engines.hf import worker
from stillhouse.teacher_service.engines.hf.worker import SampleJob, ScoreJob, Worker, take_equal_lengths

_CPU_BATCH_TOKENS = 512
"""Fewer on a CPU, which computes one sequence at a time: a few waiting ones keep it busy."""


class ModelEngine(abc.ABC):
    """Engine whose model belongs to one thread. On a CPU each sequence has its own pass, since kernels sum in an order that
    depends on the batch."""

    info: EngineInfo

    def __init__(self, config: TeacherConfig, device: torch.device) -> None:
        self._shared_tokens = 0 if device.type == "cpu" else batch_tokens(config, device)
        """Tokens of a shared pass; 0 shares none."""
        self._worker = Worker(
            score=self._score_batch,
            step=self._generate_token,
            select_batch=self._select_batch,
            num_threads=config.num_threads,
        )

    @classmethod
    async def load(cls, config: TeacherConfig) -> Self:
        """Loads the model. Raises `StillhouseError` with MODEL_NOT_FOUND or INVALID_CONFIG."""
        return await asyncio.to_thread(cls._load, config)

    @classmethod
    @abc.abstractmethod
    def _load(cls, config: TeacherConfig) -> Self:
        """Loads the model in this thread."""

    async def score(self, item: ScoreInput) -> Distributions:
        """Computes the distributions of one sequence, or its class row."""
        return await self._worker.score(item)

    async def check(self) -> None:
        """Raises `StillhouseError` if the thread that owns the model has ended."""
        if self._worker.death is not None:
            raise worker.engine_dead(self._worker.death)

    async def close(self) -> None:
        """Ends the thread after its current pass."""
        await asyncio.to_thread(self._worker.close)

    def _select_batch(self, waiting: deque[ScoreJob]) -> list[ScoreJob]:
        return take_equal_lengths(waiting, self._shared_tokens)

    def _score_batch(self, batch: list[ScoreJob]) -> None:
        """Scores a batch; where that fails each sequence alone, so that one cannot fail another."""
        try:
            with torch.inference_mode():
                self._compute_batch(batch)
        except Exception as error:
            worker.raise_if_fatal(error)
            if len(batch) > 1:
                for job in batch:
                    if not job.future.done():
                        self._score_batch([job])
            else:
                batch[0].future.set_exception(worker.as_input_error(error))

    @abc.abstractmethod
    def _compute_batch(self, batch: list[ScoreJob]) -> None:
        """Sets the result, or the error, of each sequence of one length."""

    @abc.abstractmethod
    def _generate_token(self, job: SampleJob) -> GeneratedChunk:
        """Computes the next token of a sample."""


def batch_tokens(config: TeacherConfig, device: torch.device) -> int:
    """Tokens that keep the engine busy."""
    return _CPU_BATCH_TOKENS if device.type == "cpu" else config.max_batch_tokens or BATCH_TOKENS


def sequence_limit(config: TeacherConfig, positions: int) -> int:
    """Longest sequence that is served of a model of so many positions. Raises `StillhouseError` with INVALID_CONFIG."""
    limit = config.max_sequence_tokens or positions
    if limit > positions:
        raise StillhouseError(
            Reason.INVALID_CONFIG,
            f"--max-sequence-tokens is {limit}; {config.model} knows {positions} positions. Lower it.",
        )
    return limit
