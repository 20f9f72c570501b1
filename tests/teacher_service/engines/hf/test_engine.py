"""Reference engine: bitwise equal alone and in a batch, distributions known in closed form, orderly shutdown."""

from __future__ import annotations

import asyncio
import math
import threading
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.teacher_service.config import BATCH_TOKENS, TeacherConfig
from stillhouse.teacher_service.engine import DistributionOptions, GenerateInput, ScoreInput
from stillhouse.teacher_service.engines.hf.engine import HfEngine
from stillhouse.teacher_service.engines.hf.worker import MAX_ACTIVE_SAMPLES, MAX_UNREAD_CHUNKS, ScoreJob
from tests.conftest import Models
from tests.support.small_models import save_model
from tests.teacher_service.calls import assert_agrees, random_ids, reference_logprobs

OPTIONS = DistributionOptions(
    top_k=20, temperatures=(2.0,), num_sampled_tokens=4, entropy=True, hidden_states=True
)
PARTS = (
    "token_ids",
    "logprobs",
    "target_logprobs",
    "log_tail",
    "log_partitions",
    "sampled_token_ids",
    "entropy",
    "hidden_states",
)


@asynccontextmanager
async def loaded(model: Path, **fields: Any) -> AsyncIterator[HfEngine]:
    engine = await HfEngine.load(TeacherConfig(model=str(model), threads=1, **fields))
    try:
        yield engine
    finally:
        await engine.close()


def item(ids: Any, start: int = 1, **fields: Any) -> ScoreInput:
    fields.setdefault("options", OPTIONS)
    return ScoreInput(token_ids=np.asarray(ids, np.int32), start=start, **fields)


async def test_a_sequence_alone_and_in_a_batch_is_bitwise_equal(models: Models) -> None:
    async with loaded(models.teacher) as engine:
        sequences = [random_ids(length, seed) for length in (2, 3, 17, 64, 129) for seed in range(6)]
        alone = [await engine.score(item(ids)) for ids in sequences]
        crowd = await asyncio.gather(*(engine.score(item(ids)) for ids in sequences))
        prompt = GenerateInput(token_ids=random_ids(9), seed=4, max_new_tokens=12, options=OPTIONS)
        text_alone = await text_of(engine, prompt)
        busy = [engine.score(item(ids)) for ids in sequences]
        others = [
            text_of(engine, GenerateInput(token_ids=random_ids(5, seed), max_new_tokens=12))
            for seed in range(5)
        ]
        text_in_crowd, *_ = await asyncio.gather(text_of(engine, prompt), *busy, *others)
    for one, same in zip(alone, crowd, strict=True):
        for part in PARTS:
            assert np.array_equal(getattr(one, part), getattr(same, part))
    assert text_alone == text_in_crowd


async def text_of(engine: HfEngine, prompt: GenerateInput) -> list[int]:
    return [int(chunk.token_ids[0]) async for chunk in engine.generate(prompt)]


async def test_sequences_of_one_length_and_adapter_can_share_a_pass(models: Models) -> None:
    """On a GPU sequences share passes, equal up to the rounding of another order of sums."""
    async with loaded(models.teacher) as engine:
        await engine.load_adapter("a", models.adapter_a)
        asked = [
            item(random_ids(length, seed), start=1 + seed, adapter=adapter)
            for seed in range(4)
            for length in (9, 12)
            for adapter in ("", "a")
        ]
        alone = [await engine.score(each) for each in asked]
        sizes = []
        take = engine._worker._select_batch

        def counted(waiting: deque[ScoreJob]) -> list[ScoreJob]:
            batch = take(waiting)
            sizes.append(len(batch))
            return batch

        engine._shared_tokens = BATCH_TOKENS
        engine._worker._select_batch = counted
        async with paused(engine):
            scoring = asyncio.gather(*(engine.score(each) for each in asked))
            await asyncio.sleep(0.05)
        shared = await scoring
    assert sizes == [4, 4, 4, 4]
    for one, same in zip(alone, shared, strict=True):
        assert one.start == same.start
        assert np.array_equal(one.token_ids, same.token_ids)
        assert np.abs(one.logprobs - same.logprobs).max() < 1e-5


async def test_scoring_the_end_of_a_sequence_equals_scoring_all_of_it(models: Models) -> None:
    async with loaded(models.teacher) as engine:
        ids = random_ids(40)
        whole, end = await engine.score(item(ids)), await engine.score(item(ids, start=31))
    rest = whole.rows(30, 39)
    assert end.start == rest.start == 31
    assert np.array_equal(end.token_ids, rest.token_ids)
    assert np.array_equal(end.sampled_token_ids, rest.sampled_token_ids)  # type: ignore[arg-type]
    assert np.abs(end.logprobs - rest.logprobs).max() < 1e-5


async def test_a_model_without_a_cache_to_trust_generates_by_whole_passes(
    models: Models, tmp_path: Path
) -> None:
    """RecurrentGemma keeps the state of one sample in its modules, where samples in turns would share it."""
    from transformers import AutoTokenizer, RecurrentGemmaConfig, RecurrentGemmaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(models.teacher)
    config = RecurrentGemmaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        lru_width=32,
        attention_window_size=16,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    save_model(RecurrentGemmaForCausalLM(config), tokenizer, tmp_path / "recurrent")
    prompts = [random_ids(9), random_ids(5)]
    async with loaded(tmp_path / "recurrent") as engine:
        texts = await asyncio.gather(
            *(
                text_of(engine, GenerateInput(token_ids=ids, temperature=0, max_new_tokens=6))
                for ids in prompts
            )
        )
        for ids, text in zip(prompts, texts, strict=True):
            scored = await engine.score(item([*ids, *text], start=len(ids)))
            assert scored.token_ids[:, 0].tolist() == text


async def test_every_row_predicts_the_token_that_the_contract_says(models: Models, tmp_path: Path) -> None:
    """A bigram model: the successor of token a is distributed as softmax(table[a]), so every row is known in closed
    form."""
    table = bigram_model(models.teacher, tmp_path / "bigram")
    logprobs = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
    ids = random_ids(30)
    async with loaded(tmp_path / "bigram") as engine:
        for start in (1, 2, 15, 29):
            answer = await engine.score(item(ids, start=start))
            assert answer.start == start
            for row in range(30 - start):
                known = logprobs[ids[start + row - 1]]
                assert answer.target_logprobs[row] == pytest.approx(known[ids[start + row]], abs=1e-4)
                assert np.abs(known[answer.token_ids[row]] - answer.logprobs[row]).max() < 1e-4
                assert set(answer.token_ids[row]) == set(np.argsort(-known)[:20])
                assert math.exp(answer.log_tail[row]) == pytest.approx(
                    1 - np.exp(known[answer.token_ids[row]]).sum(), abs=1e-4
                )
        chunks = [
            chunk
            async for chunk in engine.generate(
                GenerateInput(token_ids=ids[:4], seed=1, max_new_tokens=6, options=OPTIONS)
            )
        ]
    previous = ids[3]
    for position, chunk in enumerate(chunks, start=4):
        assert chunk.distributions is not None
        assert chunk.distributions.start == position
        known = logprobs[previous]
        previous = chunk.token_ids[0]
        assert chunk.distributions.target_logprobs[0] == pytest.approx(known[previous], abs=1e-4)


def bigram_model(tokenizer_dir: Path, directory: Path) -> Any:
    """Saves the model; returns its table of logits [V, V], float64: row a is for the successor of a."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    size = len(tokenizer)
    table = torch.randn(size, size, generator=torch.Generator().manual_seed(3)) * 2
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=size,
            hidden_size=size,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=size // 32,
            num_key_value_heads=size // 32,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    with torch.no_grad():
        for layer in model.model.layers:  # without additions the layers pass the embedding through
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size) * 100)
        # The last norm makes sqrt(size) of the only entry.
        model.lm_head.weight.copy_(table.T / math.sqrt(size))
    save_model(model, tokenizer, directory)
    return table.double().numpy()


async def test_capped_logits_are_the_models_own(models: Models, tmp_path: Path) -> None:
    """Gemma 2 caps its logits after the output layer, so the layer alone does not explain them."""
    from transformers import AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        final_logit_softcapping=2.0,
        initializer_range=0.5,
        pad_token_id=1,
        eos_token_id=0,
        bos_token_id=0,
    )
    save_model(Gemma2ForCausalLM(config), AutoTokenizer.from_pretrained(models.teacher), tmp_path)
    ids = random_ids(20)
    async with loaded(tmp_path) as engine:
        assert teacher_pb2.CAPABILITY_HIDDEN_STATES not in engine.info.capabilities
        answer = await engine.score(item(ids, start=5, options=DistributionOptions(top_k=20)))
        assert_agrees(answer, ids, reference_logprobs(tmp_path, ids), top_k=20)
        written = await text_of(engine, GenerateInput(token_ids=ids[:5], temperature=0, max_new_tokens=4))
    greedy = reference_logprobs(tmp_path, np.concatenate([ids[:5], np.array(written, np.int32)]))
    assert greedy[4:8].argmax(axis=1).tolist() == written


@pytest.mark.faults(row=17)
async def test_damaged_weights_fail_only_the_sequences_that_use_them(models: Models, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(models.teacher)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    save_model(model, AutoTokenizer.from_pretrained(models.teacher), tmp_path)
    async with loaded(tmp_path) as engine:
        good, bad = np.array([10, 11, 12], np.int32), np.array([10, 7, 12], np.int32)
        answers = await asyncio.gather(
            *(engine.score(item(ids)) for ids in (good, bad, good)), return_exceptions=True
        )
        assert [type(answer).__name__ for answer in answers] == [
            "Distributions",
            "StillhouseError",
            "Distributions",
        ]
        assert isinstance(answers[1], StillhouseError)
        assert answers[1].reason == Reason.NON_FINITE
        with pytest.raises(StillhouseError) as caught:
            await text_of(engine, GenerateInput(token_ids=bad, max_new_tokens=3))
        assert caught.value.reason == Reason.NON_FINITE


async def test_adapter_slots_run_out_and_are_freed(models: Models) -> None:
    async with loaded(models.teacher, max_adapters=1) as engine:
        base = await engine.score(item(random_ids(9)))
        await engine.load_adapter("a", models.adapter_a)
        with pytest.raises(StillhouseError, match="--max-adapters") as caught:
            await engine.load_adapter("b", models.adapter_b)
        assert caught.value.reason == Reason.ADAPTER_SLOTS
        await engine.unload_adapter("a")
        await engine.load_adapter("b", models.adapter_b)
        assert list(engine._slots.slots) == ["b"]
        again = await engine.score(item(random_ids(9)))
    assert np.array_equal(base.logprobs, again.logprobs)


async def test_a_stopped_reader_pauses_only_its_own_sample(models: Models) -> None:
    async with loaded(models.teacher) as engine:
        slow = GenerateInput(token_ids=random_ids(4), max_new_tokens=400, temperature=0)
        async with aclosing(engine.generate(slow)) as unread:  # type: ignore[type-var]
            await anext(unread)
            for seed in range(8):
                await text_of(engine, GenerateInput(token_ids=random_ids(5, seed), max_new_tokens=30))
            job = engine._worker._active[0]
            assert job.item is slow
            assert job.unread <= MAX_UNREAD_CHUNKS


async def test_cancelled_work_is_skipped(models: Models) -> None:
    async with loaded(models.teacher) as engine, paused(engine):
        scoring = [asyncio.create_task(engine.score(item(random_ids(500, seed)))) for seed in range(20)]
        writing = [
            asyncio.create_task(text_of(engine, GenerateInput(token_ids=random_ids(4), max_new_tokens=400)))
            for _ in range(2 * MAX_ACTIVE_SAMPLES)
        ]
        await asyncio.sleep(0.05)
        for task in (*scoring, *writing):
            task.cancel()
        await asyncio.gather(*scoring, *writing, return_exceptions=True)
        assert all(job.future.cancelled() for job in engine._worker._sequences)
        assert engine._worker._runnable_samples() == []


async def test_a_dead_engine_fails_all_waiting_requests(models: Models) -> None:
    async with loaded(models.teacher) as engine:
        async with paused(engine):
            waiting = asyncio.create_task(engine.score(item(random_ids(9))))
            writing = asyncio.create_task(text_of(engine, GenerateInput(token_ids=random_ids(4))))
            dying = asyncio.create_task(engine._worker.call(die))
            await asyncio.sleep(0.05)
        async with asyncio.timeout(10):
            outcomes = await asyncio.gather(waiting, writing, dying, return_exceptions=True)
        assert [getattr(outcome, "reason", None) for outcome in outcomes] == [Reason.PROCESS_DIED] * 3
        with pytest.raises(StillhouseError):
            await engine.check()
        with pytest.raises(StillhouseError):
            await engine.score(item(random_ids(9)))


def die() -> None:
    """Ends the thread as no request can."""
    raise SystemExit


@asynccontextmanager
async def paused(engine: HfEngine) -> AsyncIterator[None]:
    """Pauses the model while the block runs."""
    began, go_on = threading.Event(), threading.Event()

    def pause() -> None:
        began.set()
        go_on.wait()

    pausing = asyncio.create_task(engine._worker.call(pause))
    assert await asyncio.to_thread(began.wait, 60)
    try:
        yield
    finally:
        go_on.set()
        await pausing
