"""Steps of vLLM whose rows are selected during the step after them: the same numbers, each once, for whoever still waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from benchmarks.teacher_models import Shape, make_teacher
from examples.small_models import make_adapter
from teacher_service.config import TeacherConfig
from teacher_service.engine import DistributionOptions, GenerateItem, ScoreItem
from tests.teacher_service.conftest import loaded
from tests.teacher_service.test_vllm_engine import assert_equal_to, reference

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

from vllm.v1.engine import EngineCoreOutputs

from teacher_service import topk
from teacher_service.vllm_engine import VllmEngine
from teacher_service.vllm_pipeline import PendingRows, _waiting, joined

SHAPE = Shape(
    name="overlap",
    vocab_size=2200,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    intermediate_size=96,
    num_sequences=1,
    length=1,
    num_texts=1,
)
BATCH_TOKENS = 512
TOP_K = 64


def scheduler(log: list[Any]) -> Any:
    def original(self: Any, scheduled: str, output: Any) -> dict[int, Any]:
        log.append(("answered", scheduled))
        return {0: EngineCoreOutputs(outputs=[scheduled], finished_requests={scheduled})}

    update, this = _waiting(original), SimpleNamespace()
    return lambda scheduled, output: update(this, scheduled, output)


def answer(log: list[Any], name: str, *, pending: bool) -> Any:
    rows = PendingRows({}, lambda: log.append(("finished", name))) if pending else {}
    return SimpleNamespace(prompt_logprobs_dict=rows)


def test_an_answer_waits_for_one_step_and_not_for_a_second() -> None:
    log: list[Any] = []
    step = scheduler(log)
    assert step("a", answer(log, "a", pending=True)) == {}
    assert step("b", answer(log, "b", pending=True))[0].outputs == ["a"]
    assert log == [("finished", "a"), ("answered", "a")]
    both = step("c", answer(log, "c", pending=False))[0]
    assert both.outputs == ["b", "c"]
    assert both.finished_requests == {"b", "c"}
    assert step("d", answer(log, "d", pending=False))[0].outputs == ["d"]


def test_answers_of_two_steps_are_joined_by_client() -> None:
    earlier = {0: EngineCoreOutputs(outputs=[1]), 1: EngineCoreOutputs(outputs=[2])}
    later = {1: EngineCoreOutputs(outputs=[3]), 2: EngineCoreOutputs(outputs=[4])}
    assert {client: each.outputs for client, each in joined(earlier, later).items()} == {
        0: [1],
        1: [2, 3],
        2: [4],
    }


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    model = make_teacher(SHAPE, tmp_path_factory.mktemp("overlap") / "teacher")
    config = TeacherConfig(
        model=str(model), engine="vllm", dtype="float32", max_batch_tokens=BATCH_TOKENS, kv_cache_gib=0.25
    )
    async with loaded(config) as made:
        yield made


def scored(length: int, start: int, seed: int) -> ScoreItem:
    ids = np.random.default_rng(seed).integers(0, SHAPE.vocab_size, length, dtype=np.int32)
    return ScoreItem(token_ids=ids, start=start, options=DistributionOptions(top_k=TOP_K))


@pytest.mark.model
@pytest.mark.asyncio(loop_scope="session")
async def test_many_sequences_at_once_have_the_rows_of_transformers(engine: VllmEngine) -> None:
    assert SHAPE.vocab_size >= topk.COMPILED_VOCAB, "the compiled way is not what is tested"
    items = [
        scored(length, start, seed=number)
        for number, (length, start) in enumerate(
            [(512, 1), (700, 650), (2, 1), (33, 32), (1100, 1), *((100 + 7 * each, 1) for each in range(20))]
        )
    ]
    base = reference(engine.info.model)  # type: ignore[arg-type]
    for item, got in zip(items, await asyncio.gather(*map(engine.score, items)), strict=True):
        assert_equal_to(base, item.token_ids, got, TOP_K)


@pytest.mark.model
@pytest.mark.asyncio(loop_scope="session")
async def test_adapters_of_the_body_and_of_the_output_layer_have_the_rows_of_peft(
    engine: VllmEngine, tmp_path: Path
) -> None:
    model = Path(engine.info.model)
    adapters = {
        "body": make_adapter(tmp_path / "body", model, rank=4, seed=1),
        "both": make_adapter(tmp_path / "both", model, rank=4, seed=2, modules=("v_proj", "lm_head")),
    }
    bases = {"": reference(model)} | {name: reference(model, path) for name, path in adapters.items()}
    for name, path in adapters.items():
        await engine.load_adapter(name, path)
    try:
        for order in (["", "body"] * 8, ["body"] * 8, ["both", "", "body"] * 5, ["both"] * 4):
            items = [
                replace(scored(150 + 10 * number, 1, seed=number), adapter=name)
                for number, name in enumerate(order)
            ]
            for item, got in zip(items, await asyncio.gather(*map(engine.score, items)), strict=True):
                assert_equal_to(bases[item.adapter], item.token_ids, got, TOP_K)
    finally:
        for name in adapters:
            await engine.unload_adapter(name)


@pytest.mark.model
@pytest.mark.asyncio(loop_scope="session")
async def test_who_leaves_and_who_writes_meanwhile_changes_nothing(engine: VllmEngine) -> None:
    async def write() -> list[int]:
        item = GenerateItem(
            token_ids=np.arange(5, dtype=np.int32),
            max_new_tokens=24,
            seed=3,
            options=DistributionOptions(top_k=4),
        )
        return [int(token) async for piece in engine.generate(item) for token in piece.token_ids]

    alone = await write()
    items = [scored(300 + number, 1, seed=100 + number) for number in range(16)]
    tasks = [asyncio.create_task(engine.score(item)) for item in items]
    await asyncio.sleep(0.05)
    for task in tasks[::3]:
        task.cancel()
    assert await write() == alone
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    base = reference(engine.info.model)  # type: ignore[arg-type]
    whole = 0
    for item, got in zip(items, answers, strict=True):
        if isinstance(got, asyncio.CancelledError):
            continue
        assert not isinstance(got, BaseException)
        assert_equal_to(base, item.token_ids, got, TOP_K)
        whole += 1
    assert whole >= 10
    await engine.check()
