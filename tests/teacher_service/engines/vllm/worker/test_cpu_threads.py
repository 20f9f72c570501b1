"""Score-only steps of vLLM on all cores: the distributions of transformers, with and without adapters, beside other
requests."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

from benchmarks.teacher.models import make_tokenizer
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import DistributionOptions, GenerateInput, ScoreInput
from tests.support.small_models import make_adapter
from tests.teacher_service.conftest import loaded, view
from tests.teacher_service.engines.vllm.test_engine import assert_equal_to, joined, reference, written

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

from vllm import _custom_ops

from stillhouse.teacher_service.distributions import normalisation
from stillhouse.teacher_service.engines.vllm.engine import VllmEngine
from stillhouse.teacher_service.engines.vllm.worker.cpu_threads import KEPT_SIZES, with_free_cores
from stillhouse.teacher_service.engines.vllm.worker.lm_head import shared_output_layer
from stillhouse.teacher_service.engines.vllm.worker.request_plan import KEY

VOCAB_SIZE = 2200
BATCH_TOKENS = 512
TOP_K = 64


def step_of(*names: str, new: dict[str, Any] | None = None) -> Any:
    requests = [SimpleNamespace(req_id=name, sampling_params=params) for name, params in (new or {}).items()]
    return SimpleNamespace(
        num_scheduled_tokens=dict.fromkeys(names, 1),
        total_num_scheduled_tokens=len(names),
        scheduled_new_reqs=requests,
    )


def test_only_score_steps_use_the_free_core() -> None:
    scores = SimpleNamespace(extra_args={KEY: {"score": {"start": 1}}})
    writes = SimpleNamespace(extra_args=None)
    runner = SimpleNamespace(
        requests={
            "known": SimpleNamespace(sampling_params=scores),
            "writer": SimpleNamespace(sampling_params=writes),
        }
    )
    before = torch.get_num_threads()
    step = with_free_cores(runner, lambda _: torch.get_num_threads() - before, helpers=1)
    for size in range(4):  # no step of such a size is its first
        step(step_of(*["known"] * size))
    assert step(step_of("known")) == 1
    assert step(step_of("known", "new", new={"new": scores})) == 1
    assert step(step_of("known", "writer")) == 0
    assert step(step_of("known", "new", new={"new": writes})) == 0
    assert step(step_of("known", "pooled", new={"pooled": None})) == 0
    assert step(step_of()) == 0
    assert torch.get_num_threads() == before


def test_the_first_step_of_a_size_uses_the_free_core() -> None:
    runner = SimpleNamespace(requests={"writer": SimpleNamespace(sampling_params=None)})
    before = torch.get_num_threads()
    step = with_free_cores(runner, lambda _: torch.get_num_threads() - before, helpers=1)

    def threads_at(size: int) -> int:
        output = step_of("writer")
        output.total_num_scheduled_tokens = size
        return int(step(output))

    assert [threads_at(size) for size in (5, 5, 6, 5)] == [1, 0, 1, 0]
    for size in range(100, 100 + KEPT_SIZES):
        assert threads_at(size) == 1
    assert threads_at(5) == 1, "products that vLLM has dropped are made again"
    assert threads_at(100 + KEPT_SIZES - 1) == 0


@pytest.mark.model
@pytest.mark.skipif(not _custom_ops._supports_onednn, reason="this build's products are PyTorch's")
def test_matmuls_of_vllm_keep_the_number_of_threads_of_their_first_run() -> None:
    """Reason to count a size's first step. A vLLM for which this does not hold needs no such care."""
    script = textwrap.dedent(
        """
        import os
        import torch
        import vllm.platforms
        from vllm import _custom_ops as ops

        handler = ops.create_onednn_mm(torch.randn(2048, 512).t(), 32)

        def seconds_of_others():
            main = str(os.getpid())
            stats = [open(f"/proc/self/task/{task}/schedstat").read() for task in os.listdir("/proc/self/task") if task != main]
            return sum(int(stat.split()[0]) for stat in stats) / 1e9

        def by_others(rows, threads):
            torch._C.set_num_threads(threads)
            hidden = torch.randn(rows, 512)
            ops.onednn_mm(handler, hidden, None)
            before = seconds_of_others()
            for _ in range(100):
                ops.onednn_mm(handler, hidden, None)
            return seconds_of_others() - before

        print(by_others(400, 1), by_others(400, 2), by_others(401, 2))
        """
    )
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    first_alone, then_two, first_two = map(float, done.stdout.split())
    assert first_two > 0.01
    assert max(first_alone, then_two) < first_two / 10


def test_a_failed_step_restores_the_number_of_threads() -> None:
    scores = SimpleNamespace(extra_args={KEY: {"score": {"start": 1}}})

    def fails(_: Any) -> None:
        raise ValueError("no")

    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="no"):
        with_free_cores(SimpleNamespace(requests={}), fails, helpers=1)(step_of("a", new={"a": scores}))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_plain_output_layer_is_used_if_it_differs_by_rounding_alone(dtype: torch.dtype) -> None:
    weight_VH = torch.randn(512, 2048, generator=torch.Generator().manual_seed(1)).to(dtype)

    def one_by_one(hidden_TH: torch.Tensor) -> torch.Tensor:
        """The same matmul, summed term by term in float32."""
        terms = zip(hidden_TH.float().T, weight_VH.float().T, strict=True)
        summed = sum(torch.outer(each_T, each_V) for each_T, each_V in terms)
        assert isinstance(summed, torch.Tensor)
        return summed.to(dtype)

    def found(compute_logits: Any) -> Any:
        model = SimpleNamespace(lm_head=SimpleNamespace(weight=weight_VH), compute_logits=compute_logits)
        return shared_output_layer(
            SimpleNamespace(
                model=model, device=torch.device("cpu"), input_batch=SimpleNamespace(vocab_size=512)
            )
        )

    assert found(one_by_one) is not None
    assert found(lambda hidden_TH: one_by_one(hidden_TH) * 1.05) is None
    assert found(lambda hidden_TH: torch.tanh(one_by_one(hidden_TH) / 30) * 30) is None


def make_llama(directory: Path) -> Path:
    """Writes a model with an untied output layer, of a kind for which vLLM takes adapters of that layer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tokenizer(directory, VOCAB_SIZE)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=96,
        max_position_embeddings=2048,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def engine(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[VllmEngine]:
    model = make_llama(tmp_path_factory.mktemp("cores") / "teacher")
    config = TeacherConfig(
        model=str(model), engine="vllm", dtype="float32", max_batch_tokens=BATCH_TOKENS, kv_cache_gib=0.25
    )
    async with loaded(config) as made:
        yield made


def scored(length: int, start: int, seed: int) -> ScoreInput:
    ids = np.random.default_rng(seed).integers(0, VOCAB_SIZE, length, dtype=np.int32)
    return ScoreInput(token_ids=ids, start=start, options=DistributionOptions(top_k=TOP_K))


@pytest.mark.model
@pytest.mark.asyncio(loop_scope="session")
async def test_concurrent_sequences_have_the_rows_of_transformers(engine: VllmEngine) -> None:
    assert VOCAB_SIZE >= normalisation.COMPILED_VOCAB, "the compiled way is not what is tested"
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
        public = view(engine, "public")
        for by, order in (
            (engine, ["", "body"] * 8),
            (engine, ["body"] * 8),
            (engine, ["both", "", "body"] * 5),
            (engine, ["both"] * 4),
            (public, ["both", "", "body"] * 2),
        ):
            items = [
                replace(scored(150 + 10 * number, 1, seed=number), adapter=name)
                for number, name in enumerate(order)
            ]
            for item, got in zip(items, await asyncio.gather(*map(by.score, items)), strict=True):
                assert_equal_to(bases[item.adapter], item.token_ids, got, TOP_K)
        for name in ("both", "", "body"):
            prompt = np.arange(5, 40, dtype=np.int32)
            written_on = GenerateInput(
                token_ids=prompt,
                adapter=name,
                temperature=0.0,
                max_new_tokens=8,
                options=DistributionOptions(top_k=4),
            )
            greedy = joined(await written(engine, written_on))
            whole = torch.from_numpy(np.concatenate([prompt, greedy])).long()
            with torch.no_grad():
                likeliest = bases[name](whole[None]).logits[0, len(prompt) - 1 : -1].argmax(-1)
            assert likeliest.tolist() == greedy.tolist()
    finally:
        for name in adapters:
            await engine.unload_adapter(name)


@pytest.mark.model
@pytest.mark.asyncio(loop_scope="session")
async def test_cancelled_and_generating_requests_change_nothing(engine: VllmEngine) -> None:
    async def write() -> list[int]:
        item = GenerateInput(
            token_ids=np.arange(5, dtype=np.int32),
            max_new_tokens=24,
            seed=3,
            options=DistributionOptions(top_k=4),
        )
        ids: list[int] = joined(await written(engine, item)).tolist()
        return ids

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
