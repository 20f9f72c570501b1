"""vLLM engine against transformers in float32, in any batch, at each tier."""

from __future__ import annotations

import asyncio
import shutil
from contextlib import aclosing
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.engine import DistributionOptions, GeneratedChunk, GenerateInput, ScoreInput
from stillhouse.teacher_service.engines.vllm.engine import VllmEngine
from tests.conftest import Models
from tests.support.small_models import make_adapter, make_model
from tests.teacher_service.conftest import view

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="session")]

TOLERANCE = 1e-4


def random_ids(engine: VllmEngine, length: int, seed: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, engine.info.tokenizer_size, length, dtype=np.int32)


def reference(model_dir: Path, adapter: Path | None = None) -> Any:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()


def assert_equal_to(model: Any, token_ids: np.ndarray[Any, Any], got: Distributions, top_k: int) -> None:
    """Checks sets up to ties, and values within the tolerance."""
    with torch.no_grad():
        logits_TV = model(torch.from_numpy(token_ids.astype(np.int64))[None]).logits[0].double()
    logprobs_TV = logits_TV.log_softmax(-1)[got.start - 1 : -1].numpy()
    num_rows = len(token_ids) - got.start
    assert got.logprobs.shape == (num_rows, top_k)
    assert (got.logprobs.dtype, got.token_ids.dtype) == (np.dtype(np.float32), np.dtype(np.int32))
    targets = token_ids[got.start :]
    np.testing.assert_allclose(got.target_logprobs, logprobs_TV[np.arange(num_rows), targets], atol=TOLERANCE)
    if top_k == 0:
        assert np.all(got.log_tail == 0)
        return
    np.testing.assert_allclose(
        got.logprobs, np.take_along_axis(logprobs_TV, got.token_ids.astype(np.int64), 1), atol=TOLERANCE
    )
    assert np.all(np.diff(got.logprobs, axis=1) <= 0)
    assert all(len(set(row)) == top_k for row in got.token_ids.tolist())
    best = -np.sort(-logprobs_TV, axis=1)[:, :top_k]
    np.testing.assert_allclose(got.logprobs, best, atol=TOLERANCE)
    tail = np.exp(-np.sort(-logprobs_TV, axis=1)[:, top_k:]).sum(1)
    np.testing.assert_allclose(np.exp(got.log_tail), tail, rtol=TOLERANCE, atol=1e-6)


def drawn_from(model: Any, whole: np.ndarray[Any, Any], item: GenerateInput) -> np.ndarray[Any, Any]:
    """Log-probability of each generated token under temperature, top-k and top-p, without padding ids."""
    with torch.no_grad():
        logits_TV = model(torch.from_numpy(whole.astype(np.int64))[None]).logits[0, :, :384].double()
    rows = (logits_TV[len(item.token_ids) - 1 : -1] / item.temperature).log_softmax(-1).numpy()
    said = []
    for row, token in zip(rows, whole[len(item.token_ids) :], strict=True):
        order = np.argsort(-row)[: item.top_k or None]
        probs = np.exp(row[order]) / np.exp(row[order]).sum()
        kept = order[np.cumsum(probs) - probs < item.top_p] if item.top_p < 1 else order
        assert token in kept
        said.append(row[token] - np.log(np.exp(row[kept]).sum()))
    return np.array(said)


async def written(engine: VllmEngine, item: GenerateInput) -> list[GeneratedChunk]:
    return [chunk async for chunk in engine.generate(item)]


def joined(chunks: list[GeneratedChunk]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.concatenate([chunk.token_ids for chunk in chunks])


async def test_scores_equal_transformers_at_every_length_and_in_any_batch(
    engine: VllmEngine, models: Models
) -> None:
    base = reference(models.teacher)
    items = [
        ScoreInput(
            token_ids=random_ids(engine, length, seed=length),
            start=start,
            options=DistributionOptions(top_k=top_k),
        )
        for length, start, top_k in (
            *(
                (length, 1, 64)
                for length in (2, 3, 127, 128, 129, 199, 200, 201, 255, 256, 257, 400, 511, 512)
            ),
            *((130, start, 20) for start in (1, 2, 127, 128, 129)),
            *((512, start, 256) for start in (1, 300, 510, 511)),
            (40, 7, 0),
            (512, 500, 0),
        )
    ]
    for item, got in zip(items, await asyncio.gather(*(engine.score(item) for item in items)), strict=True):
        assert got.start == item.start
        assert_equal_to(base, item.token_ids, got, item.options.top_k)


async def test_a_sequence_again_has_the_same_rows_also_after_its_prefix_was_cached(
    engine: VllmEngine, models: Models
) -> None:
    prompt = random_ids(engine, 256, seed=9)
    await written(engine, GenerateInput(token_ids=prompt, max_new_tokens=2))
    item = ScoreInput(token_ids=prompt, start=1, options=DistributionOptions(top_k=64))
    assert_equal_to(reference(models.teacher), prompt, await engine.score(item), 64)


@pytest.mark.parametrize("draw", [{}, {"temperature": 0.6, "top_p": 0.8}, {"temperature": 0.0}, {"top_k": 5}])
async def test_generated_tokens_have_the_distributions_of_scoring(
    engine: VllmEngine, models: Models, draw: dict[str, Any]
) -> None:
    options = DistributionOptions(top_k=20)
    # Together longer than a batch: with vLLM's own seeds, a prompt read in parts kills it on a CPU.
    prompts = [random_ids(engine, length, seed=100 + length) for length in (1, 5, 127, 128, 400)]
    items = [
        GenerateInput(token_ids=prompt, max_new_tokens=30, seed=3, options=options, **draw)
        for prompt in prompts
    ]
    base = reference(models.teacher)
    for item, chunks in zip(
        items, await asyncio.gather(*(written(engine, item) for item in items)), strict=True
    ):
        ids = joined(chunks)
        assert ids.max() < engine.info.tokenizer_size
        assert [chunk.finish for chunk in chunks[:-1]] == [""] * (len(chunks) - 1)
        assert chunks[-1].finish == ("stop" if ids[-1] in engine.info.eos_token_ids else "length")
        assert len(ids) == 30 or chunks[-1].finish == "stop"
        said = Distributions.concat([chunk.distributions for chunk in chunks if chunk.distributions])
        assert said.start == len(item.token_ids)
        whole = np.concatenate([item.token_ids, ids])
        assert_equal_to(base, whole, said, 20)
        scored = await engine.score(ScoreInput(token_ids=whole, start=said.start, options=options))
        np.testing.assert_allclose(said.target_logprobs, scored.target_logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(said.logprobs, scored.logprobs, atol=TOLERANCE)
        np.testing.assert_allclose(np.exp(said.log_tail), np.exp(scored.log_tail), rtol=TOLERANCE, atol=1e-6)
        drawn = np.concatenate([chunk.sampling_logprobs for chunk in chunks])
        if draw.get("temperature") == 0:
            assert drawn.tolist() == [0.0] * len(ids)
        elif engine._tier.name == "worker":
            np.testing.assert_allclose(drawn, drawn_from(base, whole, item), atol=1e-3)
        else:
            # Padding is excluded from samples, so the sampled distribution is not the raw one.
            assert len(drawn) == 0


async def test_sampling_logprobs_are_raw_where_the_raw_distribution_is_sampled(
    engine: VllmEngine,
) -> None:
    unpadded = view(engine, tokenizer_size=engine.info.vocab_size)
    prompt = random_ids(engine, 20, seed=5)
    chunks = await written(unpadded, GenerateInput(token_ids=prompt, max_new_tokens=20, seed=1))
    assert all(chunk.distributions is None for chunk in chunks)
    whole = np.concatenate([prompt, joined(chunks)])
    scored = await engine.score(ScoreInput(token_ids=whole, start=20, options=DistributionOptions(top_k=1)))
    drawn = np.concatenate([chunk.sampling_logprobs for chunk in chunks])
    np.testing.assert_allclose(drawn, scored.target_logprobs, atol=TOLERANCE)
    for draw in ({"temperature": 0.7}, {"top_p": 0.9}, {"top_k": 3}):
        chunks = await written(unpadded, GenerateInput(token_ids=prompt, max_new_tokens=4, seed=1, **draw))
        told = [len(chunk.sampling_logprobs) for chunk in chunks]
        assert told == (
            [len(chunk.token_ids) for chunk in chunks] if engine._tier.name == "worker" else [0] * len(told)
        )


async def test_an_end_token_ends_a_sample_and_is_part_of_it(engine: VllmEngine) -> None:
    prompt = random_ids(engine, 12, seed=6)
    greedy = joined(await written(engine, GenerateInput(token_ids=prompt, temperature=0, max_new_tokens=12)))
    end = int(greedy[5])
    ending = view(engine, eos_token_ids=(end,))
    chunks = await written(ending, GenerateInput(token_ids=prompt, temperature=0, max_new_tokens=12))
    first = greedy.tolist().index(end)
    assert joined(chunks).tolist() == greedy[: first + 1].tolist()
    assert chunks[-1].finish == "stop"


async def test_a_seed_fixes_a_sample_beside_any_others(engine: VllmEngine) -> None:
    prompt = random_ids(engine, 10, seed=7)
    item = GenerateInput(token_ids=prompt, max_new_tokens=40, seed=-1)
    alone = joined(await written(engine, item))
    others = [replace(item, seed=seed, token_ids=random_ids(engine, 30 + seed, seed)) for seed in range(8)]
    crowd = await asyncio.gather(*(written(engine, each) for each in (*others, item)))
    assert joined(crowd[-1]).tolist() == alone.tolist()
    assert joined(await written(engine, replace(item, seed=2))).tolist() != alone.tolist()


async def test_cancelling_and_closing_abort_the_work(engine: VllmEngine) -> None:
    item = GenerateInput(token_ids=random_ids(engine, 4, seed=8), max_new_tokens=500, seed=1)
    writer = view(engine, eos_token_ids=())
    async with aclosing(writer.generate(item)) as chunks:
        async for _ in chunks:
            break
    long = ScoreInput(
        token_ids=random_ids(engine, 512, seed=8), start=1, options=DistributionOptions(top_k=64)
    )
    tasks = [asyncio.create_task(engine.score(long)) for _ in range(16)]
    while not engine._running:  # noqa: ASYNC110 - it wakes nobody
        await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert any(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    assert engine._llm.get_num_unfinished_requests() == 0
    assert not engine._running
    assert not writer._running
    await engine.score(long)


async def test_adapters_in_mixed_batches_equal_peft_and_leave_the_base_alone(
    engine: VllmEngine, models: Models, tmp_path: Path
) -> None:
    loaded = [
        await engine.load_adapter("a/1", models.adapter_a),
        await engine.load_adapter("b/1", models.adapter_b),
    ]
    assert [adapter.rank for adapter in loaded] == [4, 8]
    assert list(engine._adapters.requests) == [adapter.name for adapter in loaded]
    models_by_name = {
        "": reference(models.teacher),
        "a/1": reference(models.teacher, models.adapter_a),
        "b/1": reference(models.teacher, models.adapter_b),
    }
    options = DistributionOptions(top_k=64)
    for order in (["", "a/1", "b/1", ""], ["b/1", "", "a/1"], ["", ""], ["a/1", "a/1", "", "b/1", ""]):
        items = [
            ScoreInput(
                token_ids=random_ids(engine, 20 + 3 * n, seed=n), start=1, adapter=name, options=options
            )
            for n, name in enumerate(order)
        ]
        for item, got in zip(
            items, await asyncio.gather(*(engine.score(item) for item in items)), strict=True
        ):
            assert_equal_to(models_by_name[item.adapter], item.token_ids, got, 64)

    with pytest.raises(StillhouseError) as caught:
        await engine.load_adapter("c/1", models.adapter_a)
    assert caught.value.reason is Reason.ADAPTER_SLOTS

    # Another adapter under a freed name: nothing of the old one may serve, not even its cached prefixes.
    prompt = random_ids(engine, 256, seed=77)
    await written(engine, GenerateInput(token_ids=prompt, adapter="a/1", max_new_tokens=2))
    await engine.unload_adapter("a/1")
    with pytest.raises(StillhouseError) as caught:
        await engine.score(ScoreInput(token_ids=prompt, start=1, adapter="a/1", options=options))
    assert caught.value.reason is Reason.ADAPTER_NOT_FOUND
    other = make_adapter(tmp_path / "other", models.teacher, rank=2, seed=99)
    await engine.load_adapter("a/1", other)
    chunks = await written(
        engine, GenerateInput(token_ids=prompt, adapter="a/1", max_new_tokens=8, options=options)
    )
    said = Distributions.concat([chunk.distributions for chunk in chunks if chunk.distributions])
    whole = np.concatenate([prompt, joined(chunks)])
    assert_equal_to(reference(models.teacher, other), whole, said, 64)
    base = ScoreInput(token_ids=prompt, start=1, options=options)
    assert_equal_to(models_by_name[""], prompt, await engine.score(base), 64)
    for name in ("a/1", "b/1"):
        await engine.unload_adapter(name)
    assert not engine._adapters.requests


async def test_adapters_that_do_not_fit_are_refused_and_the_engine_lives(
    engine: VllmEngine, models: Models, tmp_path: Path
) -> None:
    too_wide = make_adapter(tmp_path / "wide", models.teacher, rank=16, seed=1)
    foreign = make_adapter(tmp_path / "foreign", models.foreign, rank=4, seed=1)
    deeper_model = make_model(
        tmp_path / "model", tokenizer_dir=models.teacher, hidden_size=64, num_layers=3, num_heads=2
    )
    deeper = make_adapter(tmp_path / "deeper", deeper_model, rank=4, seed=1)
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, sentence in (
        (too_wide, "--max-lora-rank 8"),
        (empty, "adapter_config.json"),
        (foreign, r"layers\.0\.self_attn"),
        (deeper, r"adapts layers\.2\.self_attn\.[qv]_proj, which this model does not have"),
    ):
        with pytest.raises(StillhouseError, match=sentence) as caught:
            await engine.load_adapter("bad", path)
        assert caught.value.reason is Reason.ADAPTER_INVALID
    assert not engine._adapters.requests
    await engine.check()
    await engine.load_adapter("good", models.adapter_a)
    await engine.unload_adapter("good")


async def test_a_lost_weight_is_named_before_vllm_starts(models: Models, tmp_path: Path) -> None:
    """vLLM itself counts a fused matrix as loaded once one of its parts is."""
    shutil.copytree(models.teacher, tmp_path / "lost")
    weights = load_file(tmp_path / "lost" / "model.safetensors")
    kept = {
        key: each for key, each in weights.items() if not key.endswith("layers.0.self_attn.k_proj.weight")
    }
    save_file(kept, tmp_path / "lost" / "model.safetensors", {"format": "pt"})
    with pytest.raises(StillhouseError, match=r"layers\.0\.self_attn\.k_proj\.weight") as refused:
        await VllmEngine.load(TeacherConfig(model=str(tmp_path / "lost"), engine="vllm"))
    assert refused.value.reason is Reason.MODEL_NOT_FOUND
