"""Worker tier of the vLLM engine: all capabilities of the hf engine, exact at every block boundary; and the step down."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from structlog.testing import capture_logs

from stillhouse.protos.errors import Reason, StillhouseError
from stillhouse.protos.stillhouse.v1 import teacher_pb2
from stillhouse.protos.tensors.distributions import Distributions
from stillhouse.teacher_service.config import TeacherConfig
from stillhouse.teacher_service.distributions import from_logits
from stillhouse.teacher_service.engine import DistributionOptions, GeneratedChunk, GenerateInput, ScoreInput
from stillhouse.teacher_service.engines.vllm import tier_selection
from stillhouse.teacher_service.engines.vllm.engine import VllmEngine
from stillhouse.teacher_service.engines.vllm.engine_args import CPU_BLOCK_TOKENS
from tests.conftest import Models
from tests.teacher_service.conftest import view
from tests.teacher_service.engines.vllm.test_engine import joined, random_ids, reference, written

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed", allow_module_level=True)

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="session")]

BLOCK = CPU_BLOCK_TOKENS
EVERYTHING = DistributionOptions(
    top_k=16,
    temperatures=(0.5, 2.0),
    num_sampled_tokens=5,
    seed=-3,
    entropy=True,
    hidden_states=True,
    sample_tail=True,
    sample_temperature=2.0,
    sampled_logprobs=True,
)


@pytest.fixture(scope="module")
def model(models: Models) -> Any:
    return reference(models.teacher)


def by_transformers(
    model: Any, ids: np.ndarray[Any, Any], start: int, options: DistributionOptions, query: Any = None
) -> Distributions:
    """Distributions of a float32 forward by the reference engine's arithmetic."""
    with torch.no_grad():
        output = model.model(torch.from_numpy(ids[:-1].astype(np.int64))[None]).last_hidden_state[0]
        spec = from_logits.RowSpec(start=start, sequence=ids, query_token_ids=query)
        return from_logits.distributions(output[start - 1 :], model.lm_head, spec, options, vocab_size=392)


def assert_same(got: Distributions, wanted: Distributions) -> None:
    assert got.start == wanted.start
    for part in fields(Distributions):
        one, other = getattr(got, part.name), getattr(wanted, part.name)
        if other is None:
            assert one is None
        elif part.name == "log_tail":
            # The two forwards differ in their last bits; each tail is exact for its own logits.
            np.testing.assert_allclose(np.exp(one), np.exp(other), rtol=1e-4, atol=1e-6)
            total = np.exp(got.logprobs.astype(np.float64)).sum(axis=1) + np.exp(one.astype(np.float64))
            assert np.abs(total - 1).max() < 1e-6
        elif part.name == "token_ids":
            assert (one == other).sum() >= 0.99 * other.size  # except for ties
        elif part.name == "sampled_token_ids":
            # A uniform between two tokens may fall on either side by the last bit of a probability.
            assert (one == other).sum() >= 0.99 * other.size
        elif part.name == "sampled_logprobs":
            assert (np.abs(one - other) < 1e-4).sum() >= 0.99 * other.size
        elif part.name != "start":
            assert one.dtype == other.dtype
            np.testing.assert_allclose(one, other, atol=1e-4, err_msg=part.name)


async def test_everything_is_exact_at_block_boundaries_and_at_the_shortest_and_longest(
    worker_engine: VllmEngine, model: Any
) -> None:
    items = []
    for length in (
        2,
        3,
        BLOCK - 1,
        BLOCK,
        BLOCK + 1,
        BLOCK + 2,
        2 * BLOCK,
        2 * BLOCK + 1,
        200,
        201,
        511,
        512,
    ):
        for start in sorted({1, length // 2, length - 1} - {0}):
            ids = random_ids(worker_engine, length, seed=length)
            query = np.random.default_rng(start).integers(-1, 392, (length - start, 3)).astype(np.int32)
            items.append(ScoreInput(token_ids=ids, start=start, query_token_ids=query, options=EVERYTHING))
    answers = await asyncio.gather(*(worker_engine.score(item) for item in items))
    for item, got in zip(items, answers, strict=True):
        wanted = by_transformers(model, item.token_ids, item.start, item.options, item.query_token_ids)
        assert_same(got, wanted)


@pytest.mark.parametrize(
    "prompt_length", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK]
)
async def test_completions_of_one_prompt_share_its_prefix_and_keep_their_first_row(
    worker_engine: VllmEngine, model: Any, prompt_length: int
) -> None:
    prompt = random_ids(worker_engine, prompt_length, seed=prompt_length)
    options = DistributionOptions(top_k=8)
    items = [
        ScoreInput(
            token_ids=np.concatenate([prompt, random_ids(worker_engine, 5 + number, seed=number)]),
            start=prompt_length,
            options=options,
        )
        for number in range(3)
    ]
    # Sequentially, concurrently, and every sequence again: from the cache in every way.
    for group in (items[:1], items, items):
        for item, got in zip(
            group,
            await asyncio.gather(*(worker_engine.score_once(item, reuse=True) for item in group)),
            strict=True,
        ):
            assert_same(got, by_transformers(model, item.token_ids, item.start, options))
    whole = replace(items[0], start=1)
    assert_same(
        await worker_engine.score_once(whole, reuse=True), by_transformers(model, whole.token_ids, 1, options)
    )


async def test_prefix_cache_hits_are_counted(worker_engine: VllmEngine) -> None:
    ids = random_ids(worker_engine, 3 * BLOCK + 7, seed=4321)
    cached = []
    for start in (3 * BLOCK, 3 * BLOCK, 2 * BLOCK + 1, 1):
        item = ScoreInput(token_ids=ids, start=start, options=DistributionOptions(top_k=1))
        prompt, params = worker_engine._tier.score_params(item, reuse=True)
        cached.append((await worker_engine._last_output(prompt, params, "")).num_cached_tokens)
    # Row 0 needs the token before it: the last token of a prompt of full blocks is recomputed.
    assert cached == [0, 2 * BLOCK, 2 * BLOCK, 0]


async def test_missing_rows_are_scored_again_without_the_cache(worker_engine: VllmEngine, model: Any) -> None:
    item = ScoreInput(
        token_ids=random_ids(worker_engine, 2 * BLOCK + 3, seed=99),
        start=5,
        options=DistributionOptions(top_k=3),
    )
    await worker_engine.score(item)
    tier = view(worker_engine)._tier
    asked = []

    def score_params(item: ScoreInput, *, reuse: bool) -> tuple[list[int], Any]:
        """Leaves out rows while the cache may be used."""
        asked.append(reuse)
        prompt, params = type(tier).score_params(tier, item, reuse=reuse)
        if reuse:
            params.extra_args["stillhouse"]["score"]["start"] = BLOCK + 1
        return prompt, params

    tier.score_params = score_params
    engine = VllmEngine(worker_engine._llm, worker_engine.info, worker_engine._adapters, tier=tier)
    got = await engine.score(item)
    assert asked == [True, False]
    assert_same(got, by_transformers(model, item.token_ids, 5, item.options))


@pytest.mark.parametrize("draw", [{}, {"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9, "top_k": 30}])
async def test_generated_tokens_carry_everything_that_scoring_reports(
    worker_engine: VllmEngine, model: Any, draw: dict[str, Any]
) -> None:
    items = [
        GenerateInput(
            token_ids=random_ids(worker_engine, length, seed=length),
            max_new_tokens=20,
            seed=length,
            options=replace(EVERYTHING, top_k=top_k, hidden_states=False, entropy=top_k > 4),
            single_chunk=length == BLOCK,
            **draw,
        )
        for length, top_k in ((1, 0), (7, 4), (BLOCK, 16), (300, 16))
    ]
    engine = view(worker_engine, eos_token_ids=())
    for item, chunks in zip(
        items, await asyncio.gather(*(written(engine, item) for item in items)), strict=True
    ):
        whole = np.concatenate([item.token_ids, joined(chunks)])
        assert len(whole) == len(item.token_ids) + 20
        said = Distributions.concat([chunk.distributions for chunk in chunks if chunk.distributions])
        assert item.options is not None
        scored = await engine.score(
            ScoreInput(token_ids=whole, start=len(item.token_ids), options=item.options)
        )
        assert_same(said, scored)
        assert_same(said, by_transformers(model, whole, said.start, item.options))


async def test_non_finite_logits_fail_their_sequence_alone(
    worker_engine: VllmEngine, models: Models, model: Any, tmp_path: Any
) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_bytes((models.adapter_a / "adapter_config.json").read_bytes())
    weights = load_file(models.adapter_a / "adapter_model.safetensors")
    save_file({name: weight * 1e30 for name, weight in weights.items()}, broken / "adapter_model.safetensors")
    await worker_engine.load_adapter("broken/1", broken)
    try:
        ids = random_ids(worker_engine, 40, seed=1)
        options = DistributionOptions(top_k=4)
        good = ScoreInput(token_ids=ids, start=3, options=options)
        bad = replace(good, adapter="broken/1")
        answers = await asyncio.gather(*map(worker_engine.score, (good, bad, good)), return_exceptions=True)
        failure = answers.pop(1)
        assert isinstance(failure, StillhouseError)
        assert failure.reason is Reason.NON_FINITE
        for answer in answers:
            assert isinstance(answer, Distributions)
            assert_same(answer, by_transformers(model, ids, 3, options))
        samples = [
            GenerateInput(token_ids=ids, max_new_tokens=4, seed=1, adapter=name, options=each)
            for name, each in (("", options), ("broken/1", options), ("broken/1", None))
        ]
        texts = await asyncio.gather(
            *(written(worker_engine, each) for each in samples), return_exceptions=True
        )
        assert isinstance(texts[0], list)
        for text in texts[1:]:
            assert isinstance(text, StillhouseError)
            assert text.reason is Reason.NON_FINITE
    finally:
        await worker_engine.unload_adapter("broken/1")


async def test_adapters_never_share_the_prefix_cache(worker_engine: VllmEngine, models: Models) -> None:
    ids = random_ids(worker_engine, 2 * BLOCK + 9, seed=31)
    options = DistributionOptions(top_k=8)
    await worker_engine.load_adapter("own/1", models.adapter_a)
    try:
        for adapter, path in (
            ("", None),
            ("own/1", models.adapter_a),
            ("", None),
            ("own/1", models.adapter_a),
        ):
            item = ScoreInput(token_ids=ids, start=2 * BLOCK + 1, adapter=adapter, options=options)
            got = await worker_engine.score_once(item, reuse=True)
            with torch.no_grad():
                logits = reference(models.teacher, path)(torch.from_numpy(ids.astype(np.int64))[None]).logits[
                    0
                ]
            wanted = (
                logits.double()
                .log_softmax(-1)[2 * BLOCK : -1]
                .gather(1, torch.from_numpy(got.token_ids).long())
            )
            np.testing.assert_allclose(got.logprobs, wanted.numpy(), atol=1e-4)
    finally:
        await worker_engine.unload_adapter("own/1")


async def test_the_engine_reports_its_tier_and_capabilities(worker_engine: VllmEngine) -> None:
    assert worker_engine.info.engine.endswith("(tier worker)")
    assert worker_engine._tier.reuse
    assert worker_engine.info.max_query_tokens == 1024
    assert {
        teacher_pb2.CAPABILITY_PREFIX_REUSE,
        teacher_pb2.CAPABILITY_LOG_PARTITIONS,
        teacher_pb2.CAPABILITY_QUERY_LOGPROBS,
        teacher_pb2.CAPABILITY_SAMPLED_TOKENS,
        teacher_pb2.CAPABILITY_TAIL_SAMPLES,
        teacher_pb2.CAPABILITY_ENTROPY,
        teacher_pb2.CAPABILITY_HIDDEN_STATES,
    } <= worker_engine.info.capabilities


class _Wrong:
    """An engine whose tier disagrees with vLLM."""

    def __init__(self, engine: VllmEngine, change: str) -> None:
        self._engine = engine
        self._change = change

    async def score_once(self, item: ScoreInput, *, reuse: bool) -> Distributions:
        answer = await self._engine.score_once(item, reuse=reuse)
        if self._change == "unreadable":
            raise RuntimeError("rows of 3 ids")
        array = getattr(answer, self._change).copy()
        array[-1] = (array[-1] + 7) % 300 if self._change == "token_ids" else array[-1] + 0.01
        return replace(answer, **{self._change: array})

    def generate(self, item: GenerateInput) -> AsyncIterator[GeneratedChunk]:
        return self._engine.generate(item)


@pytest.mark.parametrize(
    "case",
    [
        (["worker"], "logprobs", "raw"),
        (["worker"], "token_ids", "raw"),
        (["worker"], "unreadable", "raw"),
        (["worker", "raw"], "target_logprobs", "public"),
        ([], "", "worker"),
    ],
)
async def test_a_tier_that_disagrees_with_the_public_one_is_not_used(
    worker_engine: VllmEngine,
    models: Models,
    case: tuple[Sequence[str], str, str],
) -> None:
    broken, change, left = case

    def engine(tier: Any) -> Any:
        made = VllmEngine(worker_engine._llm, worker_engine.info, worker_engine._adapters, tier=tier)
        return _Wrong(made, change) if tier.name in broken else made

    config = TeacherConfig(model=str(models.teacher), engine="vllm")
    with capture_logs() as logs:
        chosen = await tier_selection.choose(config, worker_engine._llm, worker_engine.info, engine)
    assert chosen.name == left
    assert [line["tier"] for line in logs if line["event"] == "vllm tier not used"] == list(broken)
    config = replace(config, tier="public")
    assert (
        await tier_selection.choose(config, worker_engine._llm, worker_engine.info, engine)
    ).name == "public"


async def test_a_changed_front_end_leaves_the_public_tier(
    worker_engine: VllmEngine, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine import output_processor

    class Moved:
        """A processor of another class."""

    monkeypatch.setattr(output_processor, "LogprobsProcessor", Moved)
    config = TeacherConfig(model=str(models.teacher), engine="vllm")
    chosen = await tier_selection.choose(
        config,
        worker_engine._llm,
        worker_engine.info,
        lambda tier: VllmEngine(worker_engine._llm, worker_engine.info, worker_engine._adapters, tier=tier),
    )
    assert chosen.name == "public"


@pytest.mark.parametrize("name", ["raw", "public"])
async def test_a_lower_tier_refuses_missing_capabilities(worker_engine: VllmEngine, name: str) -> None:
    engine = view(worker_engine, name)
    ids = random_ids(engine, 8, seed=1)
    for options in (
        DistributionOptions(top_k=4, temperatures=(2.0,)),
        DistributionOptions(top_k=4, entropy=True),
    ):
        with pytest.raises(StillhouseError) as caught:
            await engine.score(ScoreInput(token_ids=ids, start=1, options=options))
        assert caught.value.reason is Reason.CAPABILITY
    with pytest.raises(StillhouseError, match="temperature is 3") as caught:
        await written(engine, GenerateInput(token_ids=ids, temperature=3.0))
    assert caught.value.reason is Reason.INVALID_REQUEST


async def test_the_last_test_kills_vllm_and_the_engine_reports_it(worker_engine: VllmEngine) -> None:
    writer = view(worker_engine, eos_token_ids=())
    stream = writer.generate(GenerateInput(token_ids=random_ids(writer, 4, seed=1), max_new_tokens=500))
    await anext(stream)
    for process in psutil.Process().children():
        if "EngineCore" in " ".join((process.name(), *process.cmdline())):
            process.send_signal(signal.SIGKILL)

    async def rest() -> None:
        async for _ in stream:
            pass

    with pytest.raises(StillhouseError, match="vLLM has stopped") as caught:
        await asyncio.wait_for(rest(), timeout=30)
    assert caught.value.reason is Reason.TEACHER_UNREACHABLE
    with pytest.raises(StillhouseError):
        await worker_engine.check()
