"""One vLLM engine for all tests of its parts, with a view of it per tier, since vLLM takes half a minute to start.

Also a client of each engine's service.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import resource_tracker
from typing import Any

import pytest
import pytest_asyncio

from stillhouse.teacher_service.config import TeacherConfig
from tests.conftest import Models
from tests.support.processes import no_process_left
from tests.teacher_service.calls import Teacher

BATCH_TOKENS = 200  # less than many sequences of the tests have: their prompts are read in chunks


@asynccontextmanager
async def loaded(config: TeacherConfig) -> AsyncIterator[Any]:
    """Starts a vLLM engine; checks that none of its processes is left afterwards."""
    from stillhouse.teacher_service.engines.vllm.engine import VllmEngine

    resource_tracker.ensure_running()  # one for the life of this process, not of the engine
    with no_process_left() as mark:
        os.environ.update(mark)
        try:
            engine = await VllmEngine.load(config)
            try:
                yield engine
            finally:
                await engine.close()
        finally:
            for name in mark:
                os.environ.pop(name, None)  # another engine may have the same names


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def worker_engine(models: Models) -> AsyncIterator[Any]:
    """The engine at the tier that it selects, which has to be the best."""
    if find_spec("vllm") is None:
        pytest.skip("vllm is not installed")
    config = TeacherConfig(
        model=str(models.teacher),
        engine="vllm",
        dtype="float32",
        max_adapters=2,
        max_lora_rank=8,
        max_batch_tokens=BATCH_TOKENS,
        kv_cache_gib=0.25,
    )
    async with loaded(config) as engine:
        yield engine


def view(engine: Any, tier: str | None = None, **changes: Any) -> Any:
    """The same vLLM behind an engine of another tier, or with other facts about its model."""
    from stillhouse.teacher_service.engines.vllm.engine import VllmEngine
    from stillhouse.teacher_service.engines.vllm.tiers import PublicTier, RawTier, WorkerTier

    info = replace(engine.info, **changes)
    name = tier or engine._tier.name
    made: PublicTier
    if name == "worker":
        made = WorkerTier(
            info,
            hidden_size=64,
            max_query_tokens=info.max_query_tokens,
            reuse=True,
        )
    else:
        made = {"raw": RawTier, "public": PublicTier}[name](info)
    return VllmEngine(engine._llm, info, engine._adapters, tier=made)


@pytest.fixture(params=["worker", "raw", "public"])
def engine(request: pytest.FixtureRequest, worker_engine: Any) -> Any:
    """An engine of each tier."""
    return view(worker_engine, request.param)


SECOND_RUNNER_TESTS = (
    "test_scores_are_those_of_a_float32_forward[second_runner_teacher-17-9]",
    "test_scores_are_those_of_a_float32_forward[second_runner_teacher-512-1]",
    "test_scores_are_those_of_a_float32_forward[second_runner_teacher-512-511]",
    "test_top_k_goes_from_none_to_256",
    "test_half_precision_and_packed_ids_round_only",
    "test_concurrent_streams_get_their_own_responses",
    "test_prompts_that_end_at_a_cache_block_keep_their_first_row",
    "test_optional_parts_are_right_or_refused_by_name",
    "test_query_logprobs_are_right_or_refused_by_name",
    "test_the_second_runner_has_every_capability",
    "test_generation_reports_the_distributions_of_scoring_the_completion",
    "test_sampling_logprobs_are_of_the_sampled_distribution",
    "test_greedy_generation_takes_the_argmax",
    "test_a_seed_fixes_each_sample_in_any_batch",
    "test_adapters_match_peft_also_in_mixed_batches",
)
"""Tests of the conformance suite that depend on the runner; the others show the service around it, and the interpreter is slow."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [
        item
        for item in items
        if "second_runner_teacher" in item.name
        and not {item.name, item.name.partition("[")[0]} & set(SECOND_RUNNER_TESTS)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session", params=["hf_teacher", "vllm_teacher", "second_runner_teacher"])
def teacher(request: pytest.FixtureRequest) -> Iterator[Teacher]:
    """A client of a service with each engine."""
    client = Teacher(request.getfixturevalue(request.param).target)
    yield client
    client.close()
