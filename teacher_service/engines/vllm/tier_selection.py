"""Selects the tier of a vLLM engine at the start: the best that agrees with the public tier on a short prompt."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any, Protocol

import numpy as np
import structlog

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.config import TeacherConfig, TierName
from stillhouse.teacher_service.engine import (
    DistributionOptions,
    EngineInfo,
    GeneratedChunk,
    GenerateInput,
    ScoreInput,
)
from stillhouse.teacher_service.engines.vllm import logprobs_processor
from stillhouse.teacher_service.engines.vllm.tiers import (
    TIERS,
    PublicTier,
    RawTier,
    RowsMissingError,
    WorkerTier,
)

PROMPT_TOKENS = 24
TOP_K = 8
NUM_WRITTEN = 4
TOLERANCES = {"float32": 1e-3}
"""Largest difference of a logprob by dtype; other groupings of rows move the last bits."""
_ROUGH = 0.15

_log = structlog.get_logger(__name__)


class ProbedEngine(Protocol):
    """An engine on one tier."""

    async def score_once(self, item: ScoreInput, *, reuse: bool) -> Distributions:
        """Scores once, without a retry for missing rows."""

    def generate(self, item: GenerateInput) -> AsyncIterator[GeneratedChunk]:
        """Streams the chunks of one sample."""


class StepDownError(Exception):
    """Reason to use a lower tier."""


async def choose(
    config: TeacherConfig, llm: Any, info: EngineInfo, engine: Callable[[PublicTier], ProbedEngine]
) -> PublicTier:
    """Selects the tier, at most `config.tier`, and logs why a better one is not used; `engine` builds an engine on a
    tier."""
    public = PublicTier(info)
    best = TIERS[0] if config.tier == "auto" else config.tier
    for name in TIERS[TIERS.index(best) : -1]:
        try:
            tier = await _prepared(name, config, llm, info)
            await agree(engine(public), engine(tier), info)
            if isinstance(tier, WorkerTier):
                await _check_reuse(tier, engine(tier), llm, info)
        except StepDownError as reason:
            _log.warning("vllm tier not used", tier=name, reason=str(reason))
        else:
            return tier
    return public


async def _prepared(name: TierName, config: TeacherConfig, llm: Any, info: EngineInfo) -> PublicTier:
    if reason := logprobs_processor.install():
        raise StepDownError(f"vLLM's front end has changed: {reason}")
    if name == "raw":
        native = min(config.max_query_tokens, int(llm.model_config.max_logprobs))
        return RawTier(info, max_native_queries=native if llm.vllm_config.use_v2_model_runner else 0)
    try:
        reasons = await llm.collective_rpc("stillhouse_install")
    except Exception as error:  # any error of a worker without the method
        raise StepDownError(f"the worker has no extension: {error}") from error
    if reason := next(filter(None, reasons), ""):
        raise StepDownError(f"vLLM's worker has changed: {reason}")
    return WorkerTier(
        info,
        hidden_size=int(llm.model_config.get_hidden_size()),
        max_query_tokens=config.max_query_tokens,
        reuse=True,
    )


async def agree(public: ProbedEngine, other: ProbedEngine, info: EngineInfo) -> None:
    """Raises StepDownError unless both agree on a short prompt, and on greedy tokens after it."""
    length = min(PROMPT_TOKENS, info.max_sequence_tokens - NUM_WRITTEN)
    if length < 2:
        raise StepDownError(f"sequences of {info.max_sequence_tokens} tokens are too short to check it")
    ids = np.random.default_rng(0).integers(0, info.tokenizer_size, length, dtype=np.int32)
    options = DistributionOptions(top_k=min(TOP_K, info.max_top_k))
    tolerance = TOLERANCES.get(info.dtype, _ROUGH)
    for start in {1, length // 2, length - 1}:
        item = ScoreInput(token_ids=ids, start=start, options=options)
        scored = [await _guarded(engine.score_once(item, reuse=False)) for engine in (public, other)]
        _compare(*scored, tolerance=tolerance)
    sample = GenerateInput(token_ids=ids, temperature=0, max_new_tokens=NUM_WRITTEN, options=options)
    completions = [await _guarded(_written(engine, sample)) for engine in (public, other)]
    if tolerance < _ROUGH and completions[0][0] != completions[1][0]:
        raise StepDownError(
            f"it generates {completions[1][0]} where the public tier generates {completions[0][0]}"
        )
    if completions[0][0] == completions[1][0]:
        _compare(completions[0][1], completions[1][1], tolerance=tolerance)


async def _guarded(request: Any) -> Any:
    try:
        return await request
    except (
        StillhouseError,
        RowsMissingError,
        RuntimeError,
        AttributeError,
        TypeError,
        ValueError,
        KeyError,
    ) as error:
        if isinstance(error, StillhouseError) and error.reason is Reason.TEACHER_UNREACHABLE:
            raise  # vLLM is dead, for every tier
        raise StepDownError(f"its output cannot be read: {type(error).__name__}: {error}") from error


async def _written(engine: ProbedEngine, item: GenerateInput) -> tuple[list[int], Distributions]:
    async with aclosing(engine.generate(item)) as stream:  # type: ignore[type-var]
        chunks = [chunk async for chunk in stream]
    ids = [int(token) for chunk in chunks for token in chunk.token_ids]
    return ids, Distributions.concat(
        [chunk.distributions for chunk in chunks if chunk.distributions is not None]
    )


def _compare(one: Distributions, other: Distributions, *, tolerance: float) -> None:
    """Raises StepDownError where two distributions differ by more than rounding."""
    if (one.start, one.logprobs.shape) != (other.start, other.logprobs.shape):
        raise StepDownError(
            f"its rows are {other.logprobs.shape} from {other.start}, not {one.logprobs.shape} from {one.start}"
        )
    differences = {
        "logprobs": np.abs(one.logprobs - other.logprobs).max(initial=0),
        "target_logprobs": np.abs(one.target_logprobs - other.target_logprobs).max(initial=0),
        "tails": np.abs(np.exp(one.log_tail) - np.exp(other.log_tail)).max(initial=0),
    }
    name, worst = max(differences.items(), key=lambda each: each[1])
    if not worst <= tolerance:
        raise StepDownError(f"its {name} differ from the public tier's by {worst:.3g}")
    for row, (ids, others) in enumerate(zip(one.token_ids, other.token_ids, strict=True)):
        strangers = ~np.isin(others, ids)
        if (other.logprobs[row][strangers] > one.logprobs[row].min(initial=0) + tolerance).any():
            raise StepDownError(
                f"its top tokens at {one.start + row} are {others.tolist()}, not {ids.tolist()}"
            )


async def _check_reuse(tier: WorkerTier, engine: ProbedEngine, llm: Any, info: EngineInfo) -> None:
    """Scores a sequence twice from inside its first cached block; disables reuse where rows are missing."""
    block = int(llm.vllm_config.cache_config.block_size)
    length = 2 * block + 1
    if length > info.max_sequence_tokens:
        return  # nothing missing can be cached, or the check after every result finds it
    ids = np.random.default_rng(1).integers(0, info.tokenizer_size, length, dtype=np.int32)
    options = DistributionOptions(top_k=1)
    try:
        for start in (1, block):
            await engine.score_once(ScoreInput(token_ids=ids, start=start, options=options), reuse=True)
    except RowsMissingError:
        tier.reuse = False
        _log.warning(
            "vllm prefix cache not used for scoring",
            reason="the plug-in is not in vLLM's scheduler; install stillhouse again, and look at VLLM_PLUGINS",
        )
